"""vLLM's adapter routes, with the bodies that the operators of others send.

production-stack's `LoraAdapter` and AIBrix's `ModelAdapter` send `lora_name` and `lora_path` with a
Bearer key and look for the name in `/v1/models`; AIBrix adds `base_model_name` in some versions.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.server.api.test_registration import Fleet, fleet

__all__ = ["fleet"]  # a fixture: a real engine


def call(fleet: Fleet, verb: str, **body: object) -> tuple[int, object]:
    answer = fleet.http.post(
        f"/v1/{verb}_lora_adapter", json=body, headers={"authorization": "Bearer anything"}
    )
    is_json = answer.headers["content-type"].startswith("application/json")
    return answer.status_code, answer.json()["error"] if is_json else answer.text


def models(fleet: Fleet) -> dict[str, dict[str, object]]:
    return {entry["id"]: entry for entry in fleet.http.get("/v1/models").json()["data"]}


def test_adapter_is_loaded_listed_and_unloaded_in_vllms_words(fleet: Fleet) -> None:
    path = str(fleet.sources / "first")
    body = {"lora_name": "support", "lora_path": path}
    added = "Success: LoRA adapter 'support' added successfully."
    assert call(fleet, "load", **body) == (200, added)
    assert models(fleet)["support"]["parent"] == "base"
    assert fleet.complete("support").status_code == 200

    status, error = call(fleet, "load", **body)
    assert (status, error["type"], error["code"]) == (400, "InvalidUserInput", 400)
    assert error["message"].startswith("The lora adapter 'support' has already been loaded.")
    changed = body | {"lora_path": str(fleet.sources / "second"), "load_inplace": True}
    assert call(fleet, "load", **changed) == (200, added)

    removed = "Success: LoRA adapter 'support' removed successfully."
    assert call(fleet, "unload", lora_name="support") == (200, removed)
    assert "support" not in models(fleet)
    status, error = call(fleet, "unload", lora_name="support")
    assert (status, error["type"]) == (404, "NotFoundError")
    assert error["message"] == "The lora adapter 'support' cannot be found."


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"lora_name": "x"}, 400, "InvalidUserInput"),
        ({"lora_path": "/x"}, 400, "InvalidUserInput"),
        ({"lora_name": "x", "lora_path": "{sources}/none"}, 404, "NotFoundError"),
        ({"lora_name": "x", "lora_path": "/etc"}, 400, "BadRequestError"),
        ({"lora_name": "base", "lora_path": "{sources}/first"}, 400, "InvalidUserInput"),
        ({"lora_name": "x", "lora_path": "{sources}/bad"}, 400, "BadRequestError"),
    ],
)
def test_adapter_that_cannot_be_loaded_says_so_as_vllm(
    fleet: Fleet, body: dict[str, str], status: int, kind: str
) -> None:
    shutil.copytree(fleet.sources / "first", fleet.sources / "bad", dirs_exist_ok=True)
    (fleet.sources / "bad" / "delta_config.json").write_bytes(b"{}")
    body = {name: text.format(sources=fleet.sources) for name, text in body.items()}
    found, error = call(fleet, "load", **body)
    assert (found, error["type"], error["code"]) == (status, kind, status)
    assert call(fleet, "unload")[0] == 400


def test_fields_that_other_versions_send_are_accepted(fleet: Fleet) -> None:
    path = str(fleet.sources / "first")
    more = {"base_model_name": "base", "lora_name": "extra", "lora_path": path}
    assert call(fleet, "load", **more)[0] == 200
    assert call(fleet, "unload", lora_name="extra", lora_int_id=7)[0] == 200


@pytest.mark.parametrize("use_dora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_peft_folder_is_served_as_it_is(fleet: Fleet, tiny_llama: Path, use_dora: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, use_dora=use_dora
    )
    tuned = get_peft_model(model, config)
    folder = fleet.sources / f"adapter-{use_dora}"
    tuned.save_pretrained(folder)
    body = {"lora_name": "adapter", "lora_path": str(folder)}
    assert call(fleet, "load", **body)[0] == 200
    ids = fleet.http.post("/tokenize", json={"model": "adapter", "prompt": "The quick"}).json()
    if not use_dora:  # whose rescaled rows are compressed
        prompt = torch.tensor([ids["tokens"]])
        wanted = tuned.generate(prompt, do_sample=False, max_new_tokens=8, pad_token_id=0)
        asked = {"model": "adapter", "prompt": ids["tokens"], "max_tokens": 8, "temperature": 0}
        found = fleet.http.post("/v1/completions", json={**asked, "logprobs": 0}).json()
        told = fleet.http.post(
            "/detokenize", json={"model": "adapter", "tokens": wanted[0].tolist()}
        ).json()["prompt"]
        assert told.endswith(found["choices"][0]["text"])

    digest = fleet.entry("adapter")["digest"]
    again = fleet.post(name="adapter", source=str(folder))
    assert (again.status_code, again.json()["digest"]) == (200, digest)
    (folder / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    refused = fleet.post(name="other", source=str(folder))
    assert refused.status_code == 422
    assert str(fleet.managed) not in refused.text
    assert call(fleet, "unload", lora_name="other")[0] == 200
    assert call(fleet, "unload", lora_name="adapter")[0] == 200
    for name in ("adapter", "other"):
        assert not list(fleet.managed.glob(f".{name}.partial-*"))
