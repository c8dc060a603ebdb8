"""The demo: an agent that operates web pages, improves from feedback, and can be checked at every step.

It is a *client* of gradatim, written as any user's program would be: it knows the wire and nothing else of
the package, so what it shows is what a user gets.
"""
