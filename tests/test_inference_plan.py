# SPDX-License-Identifier: BSD-3-Clause
"""Plans: what is kept, saved, read back and refused."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resnet_fast.inference import Plan, PlanError, plan
from resnet_fast.inference.plan import PLAIN, ConvKey, Entry

KEY = ConvKey(
    device="card A",
    versions="torch 1",
    settings="tf32",
    dtype="float32",
    layout="channels_last",
    input=(8, 32, 56, 56),
    weight=(64, 16, 3, 3),
    stride=(2, 2),
    padding=(1, 1),
    dilation=(1, 1),
    groups=2,
    step="conv + bias + add + relu",
)
ENTRY = Entry("fused", {PLAIN: 3e-5, "fused": 2e-5}, {"other": "cuDNN refuses"})


def filled() -> Plan:
    made = Plan()
    made.put(KEY, ENTRY)
    made.put(dataclasses.replace(KEY, device="card B"), Entry(PLAIN, {}, {"fused": "too old"}))
    return made


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    made = filled()
    path = made.save(tmp_path / "new" / "plan.json")
    assert Plan.load(path).entries() == made.entries()
    assert Plan.load(path, measure=False).measure is False
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"], "nothing is left behind"


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled().save(tmp_path / "plan.json")
    before = path.read_text()

    def fails(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(plan.os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        Plan().save(path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_printed_it_names_card_conv_choice_times_and_reasons() -> None:
    head, _, first, second = str(filled()).splitlines()
    assert head.split()[0] == "device"
    for what in (
        "card A",
        "float32 (tf32)",
        "8x32x56x56",
        "32->64 3x3 /2x2 groups 2",
        "fused 20.0",
    ):
        assert what in first, what
    assert first.index("fused 20.0") < first.index(f"{PLAIN} 30.0"), "the fastest comes first"
    assert first.endswith("other: cuDNN refuses")
    assert "not measured" in second
    assert "no entries" in str(Plan())


def changed(path: tuple[Any, ...], value: Any) -> Callable[[Any], Any]:
    def change(found: Any) -> Any:
        place = found
        for step in path[:-1]:
            place = place[step]
        if value is KeyError:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        return found

    return change


DAMAGED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a list": (lambda found: [found], "is no plan"),
    "another format": (changed(("format",), "some other file"), "is no plan"),
    "a later version": (changed(("version",), 2), "version 2; this resnet_fast reads 1"),
    "no entries": (changed(("entries",), {}), "no list of entries"),
    "an entry that is a number": (changed(("entries", 0), 4), "entry 0: entry must have"),
    "no choice": (changed(("entries", 1, "chosen"), KeyError), "entry 1: entry must have"),
    "a choice not measured": (changed(("entries", 0, "chosen"), "x"), "one that was measured"),
    "a choice that was refused": (
        changed(("entries", 1, "chosen"), "fused"),
        "one that was measured",
    ),
    "a field more": (changed(("entries", 0, "conv", "x"), 1), "entry 0: conv must have"),
    "a field less": (changed(("entries", 0, "conv", "groups"), KeyError), "conv must have"),
    "a size that is a word": (changed(("entries", 0, "conv", "input"), ["a"] * 4), "4 sizes"),
    "sizes missing": (changed(("entries", 0, "conv", "input"), [1, 2]), "4 sizes"),
    "a name that is a number": (changed(("entries", 0, "conv", "device"), 3), "device must"),
    "a time of nothing": (changed(("entries", 0, "seconds", PLAIN), 0.0), "positive"),
    "a time that is no number": (changed(("entries", 0, "seconds", PLAIN), float("nan")), "positi"),
    "a time that is a word": (changed(("entries", 0, "seconds", PLAIN), "fast"), "seconds must"),
    "reasons as a list": (changed(("entries", 0, "refused"), []), "refused must"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_and_foreign_files_are_refused(name: str, tmp_path: Path) -> None:
    path = filled().save(tmp_path / "plan.json")
    change, said = DAMAGED[name]
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(PlanError, match=said) as caught:
        Plan.load(path)
    assert "plan.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b'{"format": '])
def test_files_that_are_no_json_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match="not JSON"):
        Plan.load(path)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        Plan.load("/nowhere/plan.json")


def test_the_oldest_entries_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MAX_ENTRIES", 3)
    made = Plan()
    keys = [dataclasses.replace(KEY, groups=n) for n in range(1, 6)]
    for key in keys[:3]:
        made.put(key, ENTRY)
    made.put(keys[0], ENTRY)  # now the newest
    for key in keys[3:]:
        made.put(key, ENTRY)
    assert list(made.entries()) == [keys[0], keys[3], keys[4]]
    assert made.get(keys[1]) is None


def test_an_entry_holds_while_every_candidate_took_part() -> None:
    assert ENTRY.covers({PLAIN, "fused", "other"})
    assert ENTRY.covers({PLAIN, "fused"})
    assert not ENTRY.covers({PLAIN, "fused", "other", "new"})
    assert not ENTRY.covers({PLAIN, "other"}), "the choice itself is gone"


def test_threads_that_put_get_and_save(tmp_path: Path) -> None:
    made = Plan()
    wrong: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for n in range(60):
                key = dataclasses.replace(KEY, groups=1 + number * 60 + n)
                made.put(key, ENTRY)
                assert made.get(key) == ENTRY
                if n % 20 == 0:
                    Plan.load(made.save(tmp_path / "plan.json"))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(made) == 240
