"""What a saved checkpoint needs so that people who find it can load it: one line of code, and a model card."""

from __future__ import annotations

from pathlib import Path

_MODULE = "flexattn_hub"
AUTO_MAP = {
    "AutoConfig": f"{_MODULE}.FlexAttnLlavaConfig",
    "AutoModelForImageTextToText": f"{_MODULE}.FlexAttnLlavaForConditionalGeneration",
    "AutoProcessor": f"{_MODULE}.FlexAttnLlavaProcessor",
}
"""For config.json: where transformers' Auto classes find this package's, with trust_remote_code=True."""

_CODE = '''"""For transformers with trust_remote_code=True: the classes of this checkpoint, from flexattn_cuda."""

from flexattn_cuda import FlexAttnLlavaConfig, FlexAttnLlavaForConditionalGeneration, FlexAttnLlavaProcessor
'''

_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [flexattn, image-text-to-text]
---

# LLaVA with FlexAttention

A vision-language model whose later layers also attend to selected tokens of the high-resolution image (Li et al., ECCV
2024).

```python
import flexattn_cuda

model, processor = flexattn_cuda.load("THIS_FOLDER")
print(flexattn_cuda.ask(model, processor, "image.jpg", "Which digits are on the red sign?").text)
```

With transformers alone, where `flexattn_cuda` is installed:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("THIS_FOLDER", trust_remote_code=True)
```
"""


def write_hub_files(folder: Path) -> None:
    """Write the module that `AUTO_MAP` names, and a model card if there is no README.md yet."""
    (folder / f"{_MODULE}.py").write_text(_CODE, encoding="utf-8")
    card = folder / "README.md"
    if not card.exists():
        card.write_text(_CARD, encoding="utf-8")
