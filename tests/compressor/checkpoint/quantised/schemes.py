"""The schemes that tests run over, by name."""

from __future__ import annotations

from tests.quantised import Scheme, awq, gptq, packed
from tests.quantised_floats import (
    bitsandbytes,
    bitsandbytes_int8,
    compressed_int8,
    deepseek,
    float8_tensor,
)

SCHEMES: dict[str, Scheme] = {
    "gptq-4": gptq(4),
    "gptq-4-act-order-asymmetric": gptq(4, act_order=True, symmetric=False),
    "gptq-v2-8": gptq(8, version=2),
    "gptq-v2-4-asymmetric": gptq(4, version=2, symmetric=False),
    "gptq-3": gptq(3, symmetric=False),
    "gptq-2": gptq(2),
    "awq": awq(),
    "fp8-blocks": deepseek((32, 48)),
    "fp8-tensor": float8_tensor(),
    "packed-4": packed(4),
    "packed-4-asymmetric": packed(4, symmetric=False),
    "packed-8-rows": packed(8, group=None),
    "int8-rows": compressed_int8(),
    "bnb-int8": bitsandbytes_int8(),
    "bnb-nf4-nested": bitsandbytes("nf4", nested=True),
    "bnb-fp4": bitsandbytes("fp4", nested=False),
}
