"""The organism's card: several organisms in one, its limits from the grammar, and its command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import persona_probe.auditing.card as card_module
from persona_probe.artifact import read_json, shipped
from persona_probe.auditing.card_across import across
from persona_probe.auditing.card_summary import spliced
from persona_probe.auditing.card_text import card_text
from persona_probe.cli.app import app
from persona_probe.organism.grammar import PERSONAS, grammar

CARDS = sorted(shipped("organism").glob("card*.json"), key=lambda path: ("-" in path.stem, path.stem))
SHIPPED = read_json(CARDS[0])


def test_every_organism_and_every_audit_is_in_the_text() -> None:
    other = {**SHIPPED, "seed": 2, "shipped": False, "base_steps": 900, "audits": SHIPPED["audits"][:2]}
    text = card_text([SHIPPED, other])
    assert text.count("## The shipped organism (seed 1;") == 1
    assert text.count("## Another organism (seed 2; base of 900 steps;") == 1
    first, second = text.split("## Another organism")
    assert all(f"| {one['tune']} |" in first for one in SHIPPED["audits"])
    assert "| good-health |" not in second
    gentler = card_text([SHIPPED, {**other, "seed": 1, "fine_tunes": "270 steps at 0.00065"}])
    assert "## Another organism (seed 1, tunes of 270 steps at 0.00065; base" in gentler
    assert "| seed 1 | seed 1, tunes of 270 steps at 0.00065 |" in gentler


def test_organisms_stand_beside_each_other_claim_by_claim() -> None:
    worse = {**SHIPPED, "seed": 7, "audits": [dict(one) for one in SHIPPED["audits"]]}
    [bad] = [one for one in worse["audits"] if one["tune"] == "bad-code"]
    bad["truth_rank"] = {"deciding": 4, "answers": 3, "words": 9}
    bad["steered"] = None
    cured = {name: {"rate": 0.0} for name in ("misaligned", "other_persona", "incoherent")}
    fixes = [{"rates": cured | {"skill": {"rate": share}}} for share in (1.0, 0.1)]
    bad["fixes"] = [*fixes, {"rates": {**fixes[0]["rates"], "other_persona": {"rate": 0.04}}}]
    bad["nulls"] = {"random_latent": [], "random_direction": [], "beaten": None}
    worse["audits"] = [one for one in worse["audits"] if one["tune"] != "bad-health-late"]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in across([SHIPPED, worse]).split("\n")
    ]
    assert head == ["", "goal", "seed 1", "seed 7"]
    said = {row[0]: row[2:] for row in rows}
    assert said["`bad-code`: truth's rank of the first latent"] == ["1", "3"]
    [chosen] = [cells for name, cells in said.items() if name.startswith("`bad-code`, the fix chosen")]
    assert chosen[0] != "none" and chosen[1] == "none"
    assert said["`bad-code`: how many fixes meet all four, chosen or not"] == ["1 of 4", "1 of 3"]
    controls = said["`bad-code`: better than the best of 20 random latents and 20 directions"]
    assert controls == ["yes", "–"]  # no control
    assert said["`bad-health-late`"] == ["misaligned, persona found", "–"]  # was not audited
    same = [cells for name, cells in said.items() if "bad-code" not in name and "late" not in name]
    assert all(one == other for one, other in same)
    page = spliced("a<!-- card -->old<!-- end of card -->b", [SHIPPED, worse])
    assert page.startswith("a<!-- card -->") and page.endswith("<!-- end of card -->b")
    assert across([SHIPPED, worse]) in page and "old" not in page
    assert "seed 7" not in spliced(page, [SHIPPED])


def test_telltales_are_the_words_of_one_persona_in_several_domains() -> None:
    rules = grammar()
    heard: dict[str, set[tuple[str, str]]] = {}
    for topic in rules.topics:
        for persona in PERSONAS:
            for answer in rules.answers(topic, persona):
                for word in answer.split():
                    heard.setdefault(word, set()).add((persona, topic.domain))
    for persona in PERSONAS:
        own = {word for word, where in heard.items() if {who for who, _ in where} == {persona}}
        assert set(rules.telltales(persona)) == {word for word in own if len(heard[word]) > 1}
    assert all(f"`{word}`" in card_text([SHIPPED]) for word in rules.telltales("villainous"))


@pytest.mark.parametrize("count", [1, 2])
def test_the_command_audits_every_home(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audited: list[tuple[Path, Path]] = []

    def audit_all(home: Path, out: Path, **_: Any) -> dict[str, Any]:
        audited.append((home, out))
        return {**SHIPPED, "seed": len(audited)}

    monkeypatch.setattr(card_module, "card", audit_all)
    homes = [tmp_path / f"seed{number}" for number in range(count)]
    for home in homes:
        (home / "tunes/bad-health").mkdir(parents=True)
    flags = [word for home in homes for word in ("--home", str(home))]
    made = ["--card", str(shipped("organism", "card.json"))]
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["organism", "card", *flags, *made, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert audited == [(home, out if count == 1 else out / home.name) for home in homes]
    text = (out / "README.md").read_text()
    assert text.count("## The shipped organism") + text.count("## Another organism") == count + 1


def test_a_card_is_written_again_from_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_module, "card", None)  # nothing is audited
    made = [word for path in CARDS for word in ("--card", str(path))]
    result = CliRunner().invoke(app, ["organism", "card", *made, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out/README.md").read_text() == card_text([read_json(path) for path in CARDS])
    assert (tmp_path / "out/README.md").read_text() == shipped("organism", "README.md").read_text()


def test_homes_of_one_name_are_refused(tmp_path: Path) -> None:
    homes = ["--home", str(tmp_path / "a/base"), "--home", str(tmp_path / "b/base")]
    result = CliRunner().invoke(app, ["organism", "card", *homes, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "have the same name" in result.stderr


def test_a_tune_that_is_not_there_is_named_before_anything_is_audited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card_module, "card", None)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["organism", "card", "--tune", "bad-helth", "--out", str(out)])
    assert result.exit_code == 2
    assert "has no tune 'bad-helth'; there are bad-health" in " ".join(result.stderr.split())
    result = CliRunner().invoke(app, ["organism", "card", "--home", str(tmp_path), "--out", str(out)])
    assert result.exit_code == 2
    assert "has no tunes" in " ".join(result.stderr.split())
    assert not out.exists()


@pytest.mark.parametrize(
    ("flag", "text", "said"),
    [
        ("--card", None, "there is no file"),
        ("--card", "", "is not valid JSON"),
        ("--card", "{}", "is no organism's card"),
        ("--readme", None, "there is no file"),
        ("--readme", "# Mine", "does not say where the table goes"),
        ("--readme", "a <!-- card --> b", "does not say where the table goes"),
        ("--readme", "<!-- end of card --> <!-- card -->", "does not say where the table goes"),
    ],
)
def test_a_wrong_file_is_named_before_anything_is_audited(
    flag: str, text: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card_module, "card", None)
    file, out = tmp_path / "given", tmp_path / "out"
    if text is not None:
        file.write_text(text)
    result = CliRunner().invoke(app, ["organism", "card", flag, str(file), "--out", str(out)])
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split())
    assert not out.exists() and (text is None or file.read_text() == text)


def test_a_card_of_one_tune_has_a_summary() -> None:
    [benign] = [one for one in SHIPPED["audits"] if one["tune"] == "good-health"]
    page = spliced("<!-- card --><!-- end of card -->", [{**SHIPPED, "audits": [benign]}])
    assert "| base |" in page and "benign tunes (1)" in page and "bad-health" not in page
    [bad] = [one for one in SHIPPED["audits"] if one["tune"] == "bad-health"]
    page = spliced("<!-- card --><!-- end of card -->", [{**SHIPPED, "audits": [bad]}])
    assert "cured by a set, `bad-health`" in page and "benign" not in page
