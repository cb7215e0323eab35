# SPDX-License-Identifier: Apache-2.0
"""
The documents and their snippets, for the tests of what they say.

A comment before a snippet says how it is tested: `<!-- test: reduced -->` runs it with small local data in place of
what needs a network, a large data set or hours; `make` and `pip` only check that what they name exists; `official` is
run by system/test_official_commands.py. Without a comment a bash or python snippet runs as it stands, and `text` is
not run. The README's snippets are those of the pages, where they run: system/test_documents.py.
"""

import re
from dataclasses import dataclass
from pathlib import Path


PROJECT = Path(__file__).parents[1]
DOCS = PROJECT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *PAGES]


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


# What a reduced snippet has in place of the real thing.
REPLACED = {
    "path/to/imagenet": "data/photos",
    "path/to/images": "data/photos",
    "--data_set CIFAR10": "--data_path data/photos",
    "facebook/deit-tiny-patch16-224": "checkpoints/deit",
    "facebook/dinov2-small": "checkpoints/dinov2",
    "pretrained=True": "pretrained=False",
    "USER/NAME": "me/readme",
    "--epochs 100": "--epochs 1",
    "--num_workers 8": "--num_workers 0",
}
SIZES = {"image_size": 32, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 48, "num_hidden_layers": 2}
SHORT = {"num_train_epochs": 1, "dataloader_num_workers": 0}
TRAIN = "python run_image_classification.py"


@dataclass
class Snippet:
    line: int
    language: str
    test: str
    code: str

    def commands(self) -> list[str]:
        """The commands of a bash snippet, without comments."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]

    def reduced(self) -> str:
        code = self.code
        for real, small in REPLACED.items():
            code = code.replace(real, small)
        if self.language == "python":
            return code
        commands = Snippet(self.line, self.language, self.test, code).commands()
        return "\n".join(command + self._extra(command) for command in commands)

    @staticmethod
    def _extra(command: str) -> str:
        flags = (
            {}
            if not command.startswith(TRAIN)
            else SHORT | (SIZES if "--model " in command and "--karatize" not in command else {})
        )
        return "".join(f" --{name} {value}" for name, value in flags.items())


def snippets(path: Path) -> list[Snippet]:
    pattern = r"(?:^<!-- test: (?P<test>\w+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$"
    text = path.read_text(encoding="utf-8")
    return [
        Snippet(text[: match.start("code")].count("\n") + 1, match["language"], match["test"] or "", match["code"])
        for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    ]


def snippets_to_run(path: Path) -> list[Snippet]:
    return [
        snippet
        for snippet in snippets(path)
        if snippet.language in ("bash", "python") and snippet.test not in ("make", "pip", "official")
    ]


# The galleries are made by a command, with commands for any checkpoint; test_gallery.py tests them.
WRITTEN = [path for path in PAGES if "gallery" not in path.parts]
RUNNABLE = [path for path in WRITTEN if snippets_to_run(path)]


def commands(test: str) -> list[str]:
    return [
        command
        for path in (*DOCUMENTS[:2], *WRITTEN)
        for snippet in snippets(path)
        if snippet.test == test
        for command in snippet.commands()
    ]
