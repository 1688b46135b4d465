"""The shapes in which people keep conversations, entities, answers and candidates, each read as one.

Every function takes a row as it was found and returns plain texts and lists, character for character: line
ends, direction marks, emoji and NUL stay. ``None`` means that there is nothing to learn from the row, which
whoever reads leaves out and counts. Offsets count Unicode characters, as Python and SQuAD do.

``names`` says what a column is called where it has another name, such as ``{"prompt": "question"}``. A list
or an object may also stand as JSON text in its column, which is how it fits into a CSV file.
"""
