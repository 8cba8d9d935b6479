"""Where content comes from: a module or a folder per kind of source, beside what several of them share. `base` says what each must do.

Nothing is imported here: a source's libraries read their settings at import, so `environment.prepare` comes before them.
"""
