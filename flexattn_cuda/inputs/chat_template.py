"""The chat template of a checkpoint, and what the messages that it renders must not contain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexattn_cuda.checkpoints.files import read_json
from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.inputs.questions import IMAGE

# The prompt of Vicuna v1, which the released weights and LLaVA-1.5 were trained with.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}" + VICUNA_SYSTEM + " {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def read_chat_template(folder: Path) -> str | None:
    """Return a checkpoint's chat template, from whichever file transformers has kept it in; None if it has none.

    Raises:
        CheckpointError: If a file cannot be read, or holds a template that is not text.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = read_json(folder / name).get("chat_template")
        if isinstance(template, str):
            return template
        if template is not None and not isinstance(template, (list, dict)):  # several templates by name: not for chats
            raise CheckpointError(f"{folder / name} has a chat_template that is not text")
    return None


def special_texts(tokenizer: Any) -> list[str]:
    """Return the texts that a tokenizer turns into special ids wherever they stand, "<image>" among them."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    texts = {*map(str, tokenizer.all_special_tokens), *added, IMAGE}
    return sorted(texts - {""}, key=lambda text: (-len(text), text))


def refuse_special_texts(conversation: Any, special: list[str], end: str | None) -> None:
    """Raise InputError if a message contains the text of a special token, which would become that token's id.

    An answer may end in the end-of-sequence token: some templates leave it to the caller to end an answer. A user's
    content that is a string, not a list of parts, may contain "<image>", as in LLaVA's own prompts.

    Args:
        conversation: Messages, or a list of conversations, as `apply_chat_template` takes them.
        special: As `special_texts` returns them.
        end: The end-of-sequence token.
    """
    for role, text, is_part in _texts(conversation):
        if role == "assistant" and end and text.endswith(end):
            text = text[: -len(end)]
        allowed = IMAGE if role == "user" and not is_part else None
        found = next((one for one in special if one in text and one != allowed), None)
        if found == IMAGE:
            raise InputError(f"a text of the {role} contains {IMAGE}, which marks where an image goes; leave it out")
        if found is not None:
            raise InputError(f"a text of the {role} contains {found!r}, a special token of the model; leave it out")


def _texts(conversation: Any) -> Iterator[tuple[str, str, bool]]:
    """Yield (role, text, whether it is one of several parts) of every text in the messages."""
    for message in conversation if isinstance(conversation, (list, tuple)) else ():
        if isinstance(message, (list, tuple)):
            yield from _texts(message)
        elif isinstance(message, dict):
            role, content = str(message.get("role")), message.get("content")
            if isinstance(content, str):
                yield role, content, False
            elif isinstance(content, (list, tuple)):
                for part in content:
                    if isinstance(part, dict) and isinstance(part.get("text"), str):
                        yield role, part["text"], True
