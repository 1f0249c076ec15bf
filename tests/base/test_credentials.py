"""Users, passwords and other secrets are shown nowhere."""

from __future__ import annotations

import pytest

from pipeline.base.credentials import without_credentials


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://host:5000/path", "http://host:5000/path"),
        ("http://user:secret@host:5000/path", "http://host:5000/path"),
        ("https://token@host", "https://host"),
        ("postgresql://u:p@ss@host/db?x=a@b", "postgresql://host/db?x=a@b"),
        ("postgresql://user:p/s?s@host/db", "postgresql://host/db"),
        ("http://host:5000/path@2", "http://host:5000/path@2"),
        ("postgresql:///db?user=u&password=geheim", "postgresql:///db?user=u&password=***"),
        ("sqlite:////tmp/a@b.db", "sqlite:////tmp/a@b.db"),
    ],
)
def test_a_uri_is_shown_without_its_credentials(uri: str, shown: str) -> None:
    assert without_credentials(uri) == shown


def test_what_is_called_a_secret_is_not_shown() -> None:
    text = "GET http://host/?token=abc&x=1 failed; DB_PASSWORD='p q' api_key=k/1 monkey=banana"
    shown = "GET http://host/?token=***&x=1 failed; DB_PASSWORD=*** api_key=*** monkey=banana"
    assert without_credentials(text) == shown


def test_the_value_of_a_secret_in_the_environment_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "alice in chains")
    assert without_credentials("401 for alice in chains with correct horse") == "401 for alice in chains with ***"
