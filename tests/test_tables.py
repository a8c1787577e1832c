"""The tables in README.md and docs/: made of the result files, and equal to them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from processes import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import tables

RESULTS = tables.Results(tables.NAME)


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda path: path.name)
def test_a_page_says_what_its_files_say(page: Path) -> None:
    """A failure here after `make bench-all`: python bench/tables.py writes the tables anew."""
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text, RESULTS) == text
    opened = text.count("<!-- figures:")
    assert opened == text.count("<!-- end -->") == len(tables.BLOCK.findall(text))


def test_every_table_is_in_a_page() -> None:
    used = [name for page in tables.PAGES for _, name, _ in tables.BLOCK.findall(page.read_text(encoding="utf-8"))]
    assert sorted(used) == sorted(tables.TABLES)


def timed(contender: str, us: float, **fields: object) -> str:
    point = {"shape": [8, 4], "dtype": "float32", "layout": "contiguous", "mode": "eval", "chain": "bn+relu"}
    times = {"contender": contender, "median_us": us, "p20_us": us, "p80_us": us}
    return json.dumps({**point, **times, **fields}) + "\n"


def test_a_ratio_is_native_over_ours(tmp_path: Path) -> None:
    lines = []
    for mode, ours in (("forward", 2.0), ("forward_backward", 4.0), ("eval", 8.0)):
        for shape, factor in (([8, 4], 1), ([8, 4, 2], 4)):
            lines += [timed("bn_ext", ours, mode=mode, shape=shape), timed("nn", 12.0 * factor, mode=mode, shape=shape)]
            lines.append(timed("compile", 10.0, mode=mode, shape=shape))
        lines += [timed(who, 1.0, mode=mode, shape=[8, 4, 2], layout="nlc") for who in ("bn_ext", "nn")]
    for part in ("-2t", "-2t-tcmalloc"):
        (tmp_path / f"mine{part}.jsonl").write_text("".join(lines))
    _, _, first, second, nlc, contiguous, every = tables.speed(tables.Results("mine", tmp_path)).splitlines()
    assert first == "| (8, 4) | 6.00 | 3.00 | 1.50 | 6.00 | 3.00 | 1.50 | 2.50 | - |"
    assert second.startswith("| (8, 4, 2) | 24.0 | 12.0 | 6.00 |")
    assert nlc.startswith("| (8, 4, 2) from (N, L, C) | 1.00 |") and nlc.endswith("| - | - |")
    assert contiguous.startswith("| geometric mean, contiguous | **12.0** | **6.00** | **3.00** |")
    assert every.startswith(f"| geometric mean, all 3 | **{144 ** (1 / 3):.2f}** |")


def test_fusion_compares_with_what_is_fused(tmp_path: Path) -> None:
    lines = [
        timed(who, us, mode=mode, chain=chain)
        for mode, factor in (("forward_backward", 1.0), ("eval", 2.0))
        for chain in ("bn+relu", "bn+add+relu")
        for who, us in (("fused", 2.0), ("separate", 4.0 * factor), ("nn", 6.0 * factor), ("compile", 9.0 * factor))
    ]
    for part in ("-2t-fusion", "-2t-fusion-tcmalloc"):
        (tmp_path / f"mine{part}.jsonl").write_text("".join(lines))
    made = tables.fusion(tables.Results("mine", tmp_path)).splitlines()
    assert made[2] == "| (8, 4) | relu | 3.00 | 2.00 | 4.50 | 3.00 | 6.00 | 4.00 | 9.00 |"
    assert made[3].startswith("| | add, relu | 3.00 |")


def test_what_is_slower_is_named(tmp_path: Path) -> None:
    """Beyond noise alone, of every file, each rival counted."""
    plain = [
        timed("bn_ext", 4.0, chain=None),
        timed("nn", 2.0, chain=None),
        timed("bn_ext", 4.0, chain=None, mode="forward_backward", p20_us=1.0),
        timed("nn", 2.0, chain=None, mode="forward_backward"),
    ]
    fused = [timed(who, us) for who, us in (("fused", 3.0), ("nn", 6.0), ("separate", 1.5), ("compile", 3.0))]
    parts = ("-2t", "-2t-tcmalloc", "-2t-recycled", "-1t-recycled", "-2t-second-order", "-2t-second-order-tcmalloc")
    for part in parts:
        (tmp_path / f"mine{part}.jsonl").write_text("".join(plain) if part == "-1t-recycled" else timed("bn_ext", 1.0))
    for part in ("-2t-fusion", "-2t-fusion-tcmalloc"):
        (tmp_path / f"mine{part}.jsonl").write_text("".join(fused) if part == "-2t-fusion" else timed("fused", 1.0))
    told = " ".join(tables.slower(tables.Results("mine", tmp_path)).split())
    assert "at 1 of 2 measurements: (8, 4) eval 0.50 (`-1t-recycled`)." in told
    assert told.endswith("beyond noise at 1 of 3 measurements: (8, 4) bn+relu eval 0.50 (`-2t-fusion`).")


def test_a_stale_page_is_named_then_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures: files -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(tables, "PAGES", (page,))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.main(["--check"]) == 1 and "old" in page.read_text()
    assert capsys.readouterr().out == "page.md: not as its files say\n"
    assert tables.main([]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- figures: files -->\n| file |") and text.endswith("|\n<!-- end -->\nafter\n")
    assert tables.main(["--check"]) == 0


def test_a_missing_file_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tables.main(["--name", "nobody", "--print", "speed"])
    assert "nobody-2t.jsonl" in capsys.readouterr().err
