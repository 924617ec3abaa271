"""Which slot has which place, alone and where several pools share their arrays."""

from __future__ import annotations

import torch

from server.deltas.pools.places import SlotPlaces


def test_reserve_of_a_free_slot_gives_the_lowest_free_place() -> None:
    places = SlotPlaces()
    assert [places.reserve(slot) for slot in (9, 4, 9, 7)] == [0, 1, 0, 2]
    places.release(4)
    assert places.reserve(30) == 1
    assert (9 in places, 4 in places, places[30]) == (True, False, 1)


def test_show_and_release_keep_sets_and_data_alike() -> None:
    place_of = torch.zeros(8, dtype=torch.int32)
    places = SlotPlaces(place_of)
    for slot in (5, 2):
        places.reserve(slot)
    assert (places.shown, places.slots, place_of.tolist()) == (frozenset(), frozenset(), [0] * 8)
    places.show(2)
    assert places.shown == {(2, 1)}
    assert places.slots == {2}
    assert place_of.tolist() == [0, 0, 2, 0, 0, 0, 0, 0]
    places.release(2)
    assert (places.shown, places.slots, place_of.tolist()) == (frozenset(), frozenset(), [0] * 8)
    assert not places.idle
    places.release(5)
    places.release(5)
    assert places.idle


def test_shared_place_is_taken_while_any_member_has_it_and_shown_while_any_shows_it() -> None:
    first, second = SlotPlaces(), SlotPlaces()
    place_of = torch.zeros(4, dtype=torch.int32)
    whole = SlotPlaces(place_of, [first, second])
    assert [first.reserve(3), second.reserve(1), second.reserve(3)] == [0, 1, 0]
    assert 1 not in first
    first.show(3)
    assert (first.shown, second.shown, whole.shown) == ({(3, 0)}, frozenset(), {(3, 0)})
    first.release(3)  # the second has it still, but does not show it
    assert (whole.shown, whole[3], place_of.tolist()) == (frozenset(), 0, [0] * 4)
    assert not first.idle
    second.show(3)
    assert place_of.tolist() == [0, 0, 0, 1]
    second.release(3)
    assert 3 not in whole
    second.release(1)
    assert first.idle
    assert second.idle
    assert whole.idle
