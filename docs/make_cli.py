"""Writes docs/cli.md from the dataclasses that are the command line's options.

python docs/make_cli.py [--print]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from nearplane.cli.fields import methods
from nearplane.cli.main import USAGE, VERBS, known_names, verb
from nearplane.cli.options import USED_FIRST, Option, options_of, takes_job

HEAD = """# The command line

<!-- made by `python docs/make_cli.py`; a test checks that it is fresh -->

```
{usage}
```

Exit status: 0 done; 1 `plan` or `verify` say no; 2 a mistake, in one sentence on standard error; 130 and 143 interrupted.
`NO_COLOR` is heeded, and where output is no terminal there are no control characters.
Standard output has the result alone, standard error has what a run says while it works. Underscores and dashes are the same in
a flag. `--help` with `--method NAME` lists the options of that method, a class of your own (`package.module:Class`) included.

Completion: `eval "$(nearplane completion bash)"` in `~/.bashrc`, or `eval "$(nearplane completion zsh)"` in `~/.zshrc`.

Names of other toolkits that are accepted, too:

| typed | means |
|---|---|
"""


def words(text: str) -> str:
    """A text as a table's cell."""
    return " ".join(text.replace("|", "\\|").replace("*", "\\*").split())


def table(options: Sequence[Option]) -> str:
    """Options as rows: flag, default, what it does."""
    lines = ["| option | default | |", "|---|---|---|"]
    for option in options:
        value = "" if "bool" in option.kind.types or option.by_place else f" {option.metavar}"
        flags = option.metavar if option.by_place else ", ".join(option.flags) + value
        default = f"`{option.shown_default}`" if option.shown_default else ""
        lines.append(f"| `{words(flags)}` | {default} | {words(option.doc)} |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    usage = USAGE.strip()
    text = HEAD.format(usage=usage)
    text += "\n".join(
        f"| {', '.join(f'`{name}`' for name in names)} | `{flag}` |" for flag, names in known_names().items()
    )
    for name in VERBS:
        module = verb(name)
        options = options_of(module)
        text += f"\n\n## nearplane {name}\n\n{' '.join((module.Options.__doc__ or '').split())}\n"
        if name == "plan":  # the settings of quantize
            options = [option for option in options if option.own]
            text += "\nTakes the settings of `quantize`, and:\n"
        groups: dict[str, list[Option]] = {}
        for option in sorted(options, key=lambda option: not option.by_place):
            groups.setdefault("" if option.own else option.group, []).append(option)
        for title in sorted(groups, key=lambda title: (title != "", title != USED_FIRST)):
            if not title.startswith("method "):
                text += f"\n**{title}**\n" if title else ""
                text += f"\n{table(groups[title])}\n"
        if name == "quantize" and takes_job(module):
            for method in methods():
                own = [option for option in options_of(module, method) if option.group == f"method {method}"]
                text += f"\n**--method {method}**\n\n{table(own) if own else 'No options of its own.'}\n"
    return text.rstrip() + "\n"


if __name__ == "__main__":
    if "--print" in sys.argv:
        print(page(), end="")
    else:
        Path(__file__).with_name("cli.md").write_text(page())
