"""HTML for people: the report of an evaluation, and the search page with its server.

Layouts are in templates/.
"""
