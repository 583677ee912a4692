"""What coding a KV cache costs a model: bits against the loss of what the model says next (docs/codec-evaluation.md).

`run.evaluate` is the whole of it. Everything runs on real bitstreams of `kvstore_codec` and on the model's own
forward pass; baselines are other codecs, written from their published formulas.
"""

import os

# Read when tqdm and transformers are imported: no hub is asked, and there is one progress display.
os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
