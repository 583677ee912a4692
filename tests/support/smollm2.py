"""SmolLM2-135M-Instruct for tests: the demo's way to load it, from one cache at the repository's root."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvstore.demo import model

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "models"

#: Written for the tests, so in nobody's training data.
TEXT = """\
The mill at the mouth of the Arve has two doors, one for the sea and one for the land, and it was the custom of the
family that nobody should leave by the door through which he had come in. Marit kept the custom even now, when there
was no family left to mind it. She came in by the land door at five, lit the stove, and read the tide table that hung
above the flour scale. High water would be at nine minutes past eleven. The pond behind the sluice would be full by
then, and from noon until four the wheel could turn without a pause, which was enough for six sacks of barley if the
stones were kept a hair apart and the boy at the hopper did not fall asleep.
The boy was her nephew Jon, fourteen years old and interested in everything except barley. He had built a float out of
a cork and a knitting needle, and every ten minutes he wrote down how far the needle stood above the rim of its jar.
He claimed that the tide did not rise as the table said it should. It came in three steps, he said, with a short rest
after each, as if the sea were climbing a stair and stopped to breathe. Marit told him that the table had been printed
in the capital by men with instruments. Jon answered that the men had never seen this bay, which was true, and that a
stair was a stair whoever printed it.
On the third day she looked at his column of numbers while the porridge cooled. The steps were there. Between the
first and the second the water stood still for almost twenty minutes, and if one opened the upper sluice in that
pause, rather than at the top of the flood, the pond would take in water that was still clear of sand. Sand was what
ate the stones. Every second winter a mason came up the coast to dress them, and every second winter his bill was
larger than the one before. She said nothing to the boy about it. She only moved the clock from the kitchen to the
sluice house, and the next morning she opened the gate by his column instead of by the printed one.
By the end of the summer the flour was finer than anybody could remember, and the baker in the upper village sent his
cart down twice a week. People asked her what had changed. Marit said that she had begun to use the other door. It was
a good answer, because nobody knew what to say to it, and because in a way it was even correct: for forty years the
mill had listened to the land, and now it had started to listen to the sea. Jon got a real gauge for his birthday,
made of brass, with a glass tube and a scale in tenths of an inch. He hung it on the outer wall beside the sea door,
and under it he carved the date and the first number.
"""


def load() -> tuple[Any, Any]:
    """(model, tokenizer), the model in bfloat16 and in eval mode. Raises FileNotFoundError naming the remedy."""
    return model.load(CACHE)
