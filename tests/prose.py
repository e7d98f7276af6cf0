"""Sentences of a Markdown text, counted in words: code, tables, headings, formulas and link targets are left out.

python tests/prose.py FILE ...    lists the sentences that are too long
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

LONGEST = 25  # words
# A sentence ends where a capital letter, code, a formula or a name that is written small follows.
END = re.compile(r"(?<=[.!?])[)\"”*]*\s+(?=[(\"“*]*(?:[A-Z0-9ΔΣ]|code|formula|nearplane|transformers|vLLM))")


def prose(text: str) -> str:
    """Return the text with code as one word each, without blocks of code, tables, headings, comments and pictures."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"^ *\$\$.*?\$\$ *$", "", text, flags=re.M | re.S)
    text = re.sub(r"<!--.*?-->|!\[[^\]]*\]\([^)]*\)|<[^>\n]+>", "", text, flags=re.S)
    text = re.sub(r"^(#| *\|).*$", "", text, flags=re.M)
    text = re.sub(r"`+[^`]+`+", "code", text)
    text = re.sub(r"\$[^$]+\$", "formula", text)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)


def sentences(text: str) -> Iterator[list[str]]:
    """Yield each sentence as its words. A list item and a paragraph begin a sentence."""
    for part in re.split(r"\n\s*\n|^\s*(?:[*+-]|\d+\.) ", prose(text), flags=re.M):
        for sentence in END.split(part):
            words = [word for word in re.split(r"[\s/·—–]+", sentence) if re.search(r"\w", word)]
            if words:
                yield words


def too_long(text: str) -> list[str]:
    """Return the sentences of more than ``LONGEST`` words."""
    return [f"{len(words)}: {' '.join(words)}" for words in sentences(text) if len(words) > LONGEST]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for line in too_long(Path(name).read_text()):
            print(f"{name} {line}")
