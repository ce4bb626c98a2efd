"""A server of adapters: described, made and used over HTTP, a different one for every request of a batch.

    limits     how much is taken on
    rows       one adapter a row, on live modules
    packed     weights as a CPU reads them best
    kv         keys and values of rows that come and go
    sampling   the next token of one row
    text       tokens into text, piece by piece, up to a stop string
    engine     continuous batching: who runs next, and what becomes of each row
    store      adapters on disk and in memory, found by what is in them
    schema     what a request may say
    app        the HTTP interface
    page       static/, the page that `/` shows

Only `t2l.cli` knows this package.
"""
