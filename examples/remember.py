"""Read a small repository once, then complete code without it: with its memory, with another's, and with none.

python examples/remember.py
"""

import torch
from transformers import AutoTokenizer

from titans_ds import TitansModel, assets

SHAPES = ["def rectangle_area(width, height):\n    return width * height\n\n\nprint(rectangle_area(2, 3))\n" * 4]
PLANETS = ["class Planet:\n    def orbit(self, years):\n        return self.period * years\n\n\nprint(Planet())\n" * 4]
PROMPT = "def total():\n    return rectangle_"


def main() -> None:
    """Prime two memories, and print what follows the prompt with each, and without."""
    tokenizer = AutoTokenizer.from_pretrained(assets.base())
    model = TitansModel.from_pretrained(assets.base(), assets.adapter("hybrid")).eval()
    prompt = tokenizer([PROMPT], return_tensors="pt")
    print(model.memory_summary())

    for name, files in (("its own memory", SHAPES), ("another's memory", PLANETS)):
        with model.memory_session(batch_size=1) as memory:
            model.prime_text(tokenizer, files, memory)
            found = model.generate(**prompt, memory=memory, max_new_tokens=12, do_sample=False)
        print(f"--- {name}\n{tokenizer.decode(found[0], skip_special_tokens=True)}")
    with model.disable_memory(), torch.no_grad():
        found = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    print(f"--- no memory\n{tokenizer.decode(found[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
