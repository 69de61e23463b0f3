"""Images and questions in, tensors out.

    images             image files and arrays, upright, padded and resized
    questions          what may be asked, and the message that asks it
    marks              the texts of a batch, and whether images match the marks in them
    chat_template      the template that writes a prompt, and what a message must not contain
    image_processor    images to pixels, as the released preprocessing makes them
    tokenizers         the tokenizers of all checkpoint formats
    sentencepiece      tokenizer.model, without the sentencepiece package
    frames             which part of an image a view shows
    processor          images and prompts to what the model takes
    image_sources      paths, URLs, bytes, arrays and tensors to images
    image_families     what the HR processor must know of a model family
    hr_processor       images and prompts to what any transformers VLM with FlexAttention takes

`images` and `questions` import neither torch nor transformers, so that a command can refuse bad input at once.
"""
