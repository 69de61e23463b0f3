"""Images and questions in, tensors out.

    images             image files and arrays, upright, padded and resized
    questions          what may be asked, and the message that asks it
    chat_template      the template that writes a prompt, and what a message must not contain
    image_processor    images to pixels, as the released preprocessing makes them
    tokenizers         the tokenizers of all checkpoint formats
    sentencepiece      tokenizer.model, without the sentencepiece package
    processor          images and prompts to what the model takes

`images` and `questions` import neither torch nor transformers, so that a command can refuse bad input at once.
"""
