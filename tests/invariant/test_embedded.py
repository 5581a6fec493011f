"""What ships inside the package: small enough, readable, and each part with its licence."""

from pathlib import Path

from finetooth import embedded

FOLDER = Path(embedded.__file__).parent


def test_at_most_four_megabytes() -> None:
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) < 4_000_000


def test_every_part_is_there_and_has_a_licence() -> None:
    notice = (FOLDER / "LICENSES.md").read_text(encoding="utf-8")
    parts = {p.relative_to(FOLDER).parts[1].split(".")[0] for p in FOLDER.glob("*/*") if not p.name.startswith("__")}
    assert parts == {"stories260K", "banking77", "tinystories"}
    assert all(part in notice for part in parts)
    assert all(embedded.path(name).exists() for name in embedded.FILES)
