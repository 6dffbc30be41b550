"""The demo task: free-text support messages to one line of JSON, generated, seeded, free of real people and firms.

It is real extraction in small: three fields are copied from the text (name, product, order number) past distractors
of the same kind, two are inferred from how the customer puts it (issue, request), and two may be null. Held-out rows
share no frame and no value with training rows, so a model cannot score by remembering. Read ``task.py`` for how a
row is made and ``words.py`` for what it is made of.
"""

from tunesmith.data.support_task.task import SCHEMA, SYSTEM_PROMPT, few_shot_prompt, generate

__all__ = ["SCHEMA", "SYSTEM_PROMPT", "few_shot_prompt", "generate"]
