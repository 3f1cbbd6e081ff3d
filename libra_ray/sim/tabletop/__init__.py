"""The table: tasks where language decides, with precision and length as dials."""
