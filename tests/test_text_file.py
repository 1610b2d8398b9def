"""Text is written whole or not at all, as UTF-8 with Unix line ends."""

from pathlib import Path

import pytest

from pl_layer_rotation._text_file import write_text


def test_text_that_cannot_be_encoded_leaves_the_old_file_whole_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "page.html", "old")
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        write_text(tmp_path / "page.html", "new \ud800")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "old"


def test_text_is_written_as_utf8_with_unix_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "page.html", "é\n层\n")
    assert (tmp_path / "page.html").read_bytes() == "é\n层\n".encode()
