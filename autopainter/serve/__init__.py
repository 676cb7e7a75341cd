"""The page to try a trained run on: a server, and what it sends to the browser (``page/``)."""
