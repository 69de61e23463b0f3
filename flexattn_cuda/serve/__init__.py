"""An HTTP server: an API that OpenAI's clients speak, and one web page.

    guard       before anything is read: token, host, how many requests, how large, how long
    schemas     what the API takes
    sources     the bytes that an image's URL stands for, and which are allowed
    images      images as the model takes them; those that were asked about before are kept
    prompts     messages to token ids and images
    jobs        one answer that is wanted, and the events that it consists of
    rows        the rows of a batch while the model generates
    engine      the thread that owns the model and answers jobs in batches
    traces      attention maps and selections in JSON
    chat        /v1/chat/completions
    responses   /v1/responses
    metrics     counters for Prometheus
    app         the routes
    run         from options to a server that listens
    page        the web page: plain HTML, CSS and JavaScript

Needs the extra `serve`. FastAPI and uvicorn serve; batching is in `engine`, since all rows of a batch must share one
forward call with its images, and each must be able to end, to be cancelled and to be streamed by itself.
"""
