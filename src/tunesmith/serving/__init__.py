"""One base, many adapters: answers to many requests at once, and the server that speaks OpenAI's protocol.

``engine.py`` is the door. ``attention.py`` and ``cache.py`` hold what is known of running answers, ``lora.py`` gives
each token its adapter, ``adapters.py`` reads and forgets them, ``choose.py`` takes the next token, ``fit.py`` says
which models it takes.

``server.py`` is the door for HTTP. ``schema.py`` says what may be asked, ``answers.py`` brings answers from the
engine's thread to the event loop, ``replies.py`` puts them into OpenAI's form, ``places.py`` says where adapters may
come from, ``metrics.py`` counts.
"""
