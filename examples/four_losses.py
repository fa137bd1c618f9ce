"""Does a memory remember these files, or does having any memory help? The loss of a text, read four ways.

    python examples/four_losses.py [OWN_FOLDER ANOTHER_FOLDER TEXT_FILE]

Without arguments: two parts of the standard library, and a file of the first.
"""

import sys
import sysconfig
from pathlib import Path

from transformers import AutoTokenizer

from titans_ds import TitansModel, assets, compare

LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def main(arguments: list[str]) -> None:
    """Print the loss with the text's own memory, another's, an empty one, and none."""
    own, other, text = (
        map(Path, arguments) if arguments else (LIBRARY / "json", LIBRARY / "wsgiref", LIBRARY / "json" / "decoder.py")
    )
    tokenizer = AutoTokenizer.from_pretrained(assets.base())
    model = TitansModel.from_pretrained(assets.base(), assets.adapter("hybrid")).eval()

    def files(folder: Path) -> list[list[int]]:
        """Token ids of a folder's files, the text's own left out."""
        found = [path for path in sorted(folder.glob("*.py")) if path.resolve() != text.resolve()]
        return [tokenizer(path.read_text())["input_ids"] for path in found]

    found = compare(model, read=files(own), wrong=files(other), text=tokenizer(text.read_text())["input_ids"][:512])
    for name, loss in (("own", found.own), ("another's", found.wrong), ("empty", found.empty), ("off", found.ablated)):
        print(f"{name:10} {loss:.4f} nats a token, {loss - found.own:+.4f} beside own")


if __name__ == "__main__":
    main(sys.argv[1:])
