"""A task whose answers are a convention that no model can know: which team of a made-up company takes which ticket.

Eight intents with ten wordings each, written by hand; the last three wordings of an intent are held out. Which team
takes an intent is drawn at random, so that nothing but feedback can tell. Synthetic data.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

TEAMS = ("Orion", "Cedar", "Falcon", "Maple", "Delta", "Harbor", "Jupiter", "Willow")
HELD_OUT = 3  # wordings of each intent that are never learned from

INSTRUCTION = (
    f"You route support tickets at a company. Answer with the name of one team and nothing else: {', '.join(TEAMS)}."
)

_WORDINGS = """
I forgot my password and cannot get in
The reset link for my password never arrives
My account is locked after too many login attempts
Two-factor codes are rejected when I sign in
It says my credentials are invalid although they are right
How do I change the password of my account?
I cannot log in since this morning
Sign-in fails with an unknown user error
The login page keeps sending me back to the start
My old phone had the authenticator app and now I am locked out

I was charged twice for the same month
There is an amount on my card that I do not recognise
The invoice shows a higher price than we agreed
Please refund last week's payment
My credit card was declined although it is valid
Why did my subscription fee go up?
I need the receipt for my last payment
You billed me after I cancelled
The tax on the invoice is wrong
Can I pay by bank transfer and not by card?

My package has not arrived yet
The tracking number does not work
The parcel was delivered to the wrong address
When will my order be shipped?
The courier left the box in the rain
It has been in transit for three weeks
I would like to change the delivery address
Part of my shipment is missing
The delivery was marked as done but nothing came
Can you send it by express mail?

The app crashes when I open the settings
I get error 500 when I save a document
The export button does nothing
The screen stays white after the update
Search results are empty although there are matches
The page freezes when I scroll down
Uploading a picture fails every time
The program closes by itself after a minute
Dark mode makes the text unreadable
The sync never finishes and shows a warning

I want to send these shoes back
The item is the wrong size, can I exchange it?
How do I return a gift?
The lamp came broken, I want another one
Where do I print the return label?
The colour is not what I ordered
I changed my mind and want to give it back
Is there a fee for returning an article?
The zipper tore on the first day, please replace the jacket
How long may I keep something before sending it back?

Please add a dark theme to the product
It would be great to have keyboard shortcuts
Can you support calendars in the next version?
I wish that I could sort the list by date
A mobile version would help our team
Please let us export to spreadsheets
An option to undo would be nice
It should be possible to work offline
Have you thought of adding voice input?
I suggest a button to copy the whole table

What data do you store about me?
Please delete all my personal information
I want a copy of everything you know about me
Do you share my data with third parties?
I withdraw my consent to tracking
Who can see my messages?
How long do you keep my records?
Your cookie banner does not let me refuse
I think that somebody else has read my profile
Where are your servers and which law applies?

I would like to apply for a job
Do you offer internships in summer?
When will I hear back about my application?
Is the position in the design group still open?
Whom do I ask about my interview next week?
Can I send you my curriculum vitae?
Do you hire people without a degree?
What is the salary for this role?
I want to work for your company from abroad
Are there part-time openings at the moment?
"""

INTENTS: tuple[tuple[str, ...], ...] = tuple(
    tuple(block.strip().splitlines()) for block in _WORDINGS.strip().split("\n\n")
)


@dataclass(frozen=True, slots=True)
class Ticket:
    intent: int
    text: str
    held_out: bool


def tickets() -> list[Ticket]:
    """All 80 of them, in the order of INTENTS."""
    return [
        Ticket(intent, text, i >= len(wordings) - HELD_OUT)
        for intent, wordings in enumerate(INTENTS)
        for i, text in enumerate(wordings)
    ]


def convention(seed: int) -> Sequence[int]:
    """For each intent the number of its team. Another seed, another company."""
    order = list(range(len(TEAMS)))
    random.Random(f"convention {seed}").shuffle(order)
    return order


def changed(before: Sequence[int]) -> Sequence[int]:
    """A convention in which every intent has another team."""
    return [*before[1:], before[0]]
