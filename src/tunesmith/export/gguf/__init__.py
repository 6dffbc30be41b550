"""GGUF, the files of llama.cpp and Ollama: written by our own converter, read again and compared with the live model.

Read ``save.py`` first; ``families.py`` says what llama.cpp calls things, ``vocab.py`` what becomes of a tokenizer.
"""
