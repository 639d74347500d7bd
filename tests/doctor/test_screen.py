import io
import json

from rich.console import Console

from dataeff.doctor.finding import Finding
from dataeff.doctor.screen import as_json_text, print_screen

FINE = Finding("torch", True, "2.13.0", "much", "pip install", area="software", essential=True)
MISSING = Finding("GPU", False, "[none]", "speed", "buy one", area="GPU", figures={"count": 0})
BROKEN = Finding("core", False, "cannot load", "all", "reinstall", area="software", essential=True)


def test_json_keeps_cost_and_remedy_for_what_is_missing_only():
    loaded = json.loads(as_json_text([FINE, MISSING]))
    assert loaded["ok"] is True
    fine, missing = loaded["findings"]
    assert fine["cost"] == fine["remedy"] == ""
    assert missing["cost"] == "speed" and missing["figures"] == {"count": 0}


def test_json_is_not_ok_when_something_essential_is_broken():
    assert json.loads(as_json_text([BROKEN, MISSING]))["ok"] is False


def test_screen_shows_areas_values_and_remedies():
    console = Console(width=120, file=io.StringIO())
    print_screen([FINE, MISSING], console)
    text = console.file.getvalue()
    assert "software" in text and "[none]" in text  # brackets are text, not markup
    assert "costs: speed" in text and "to get it: buy one" in text
    assert "much" not in text
    assert "1 of 2 as they should be" in text
