"""The five tasks without a browser: pure Python pages with the same names, wording, rules and verdicts.

For machines without Chromium and for fast tests. It plays the pages of MiniWoB++; it is not MiniWoB++, and rates
measured on it are not quoted as such. It does not know who acts.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass, field, replace

from gradatim.demo.tasks import Action, Effect, Element, Page, PageEnv

_NAMES = """
Abel Ada Agnes Aida Alan Alba Alma Amos Anita Anton Arlo Astrid Axel Basil Bea Bella Bernd Bianca Boris Bruno
Carla Carmen Casper Celia Cesar Clara Conrad Cora Cyril Dagmar Dario Delia Denis Diego Dora Edgar Edith Edna
Egon Elena Eli Elmar Elsa Emil Enid Erik Erna Esther Eva Ezra Fabian Felix Fiona Flora Franz Frida Gaia Gavin
Gerda Gino Greta Guido Hanna Harald Heidi Helga Hilda Hugo Ida Igor Ilse Imre Ines Ingrid Iris Isaac Ivan
Jakob Jana Jasper Joan Jonas Judith Julius Karl Katja Keith Klara Knut Kurt Lara Lars Laura Leo Lena Lidia Lina
Lorenz Lotte Louis Lucia Lukas Luna Lydia Magda Maia Marco Marta Matteo Maud Max Mia Mila Milo Mina Miro Moira
Mona Moritz Nadia Nico Nils Nina Noah Nora Olaf Olga Oliver Omar Orla Oscar Otis Otto Pablo Paula Pedro Petra
Philip Pia Pilar Ralf Ramon Raoul Rita Robin Rosa Rufus Ruth Sally Samir Sara Selma Silas Sofia Sonja Stella
Sven Tamar Tanja Teo Thea Tilda Tim Tobias Toni Ulla Umberto Ursula Valeria Vera Victor Viola Walter Wanda
Wilma Xenia Yara Yusuf Yvonne Zara Zelda Zita
"""
NAMES = tuple(_NAMES.split())

_BUTTONS = ("submit", "okay", "ok", "yes", "no", "cancel", "next", "previous")
_WARNINGS = (
    "Your session is about to expire.",
    "Your session is expiring soon.",
    "Your session is timing out soon.",
    "You have 10 new messages.",
    "Please do not panic.",
)
_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(slots=True)
class PlayedPages:
    """Plays one page at a time: fields take text, buttons end the episode, a dialog may come between."""

    _page: Page = field(init=False, default=Page("", ()))
    _answers: tuple[str, ...] = field(init=False, default=())
    _popup_on: int | None = field(init=False, default=None)
    _behind: Page | None = field(init=False, default=None)
    _warning: str = field(init=False, default="")

    def load(self, task: str, seed: int) -> Page:
        rng = random.Random(f"{task}/{seed}")
        self._popup_on, self._behind, self._answers = None, None, ()
        self._page = _BUILDERS[task](self, rng)
        return self._page

    def perform(self, action: Action) -> Effect:
        element = self._page.elements[action.number - 1]
        if self._behind is not None:
            return self._answer_dialog(element)
        if element.kind == "field":
            return self._fill(action)
        return Effect(self._page, acted=True, success=self._judge(element))

    def close(self) -> None:
        """Nothing is held."""

    def _fill(self, action: Action) -> Effect:
        if self._popup_on == action.number:
            self._popup_on, self._behind = None, self._page
            buttons = (Element("button", "OK"), Element("button", "Cancel"))
            self._page = Page(self._page.sentence, buttons, f"{self._warning} Exit to home page?")
            return Effect(self._page, acted=False)
        if action.verb == "click":
            return Effect(self._page, acted=False)
        elements = list(self._page.elements)
        elements[action.number - 1] = replace(elements[action.number - 1], value=action.text)
        self._page = replace(self._page, elements=tuple(elements))
        return Effect(self._page, acted=True)

    def _answer_dialog(self, element: Element) -> Effect:
        if element.label == "OK":
            return Effect(self._page, acted=True, success=False)
        assert self._behind is not None
        self._page, self._behind = self._behind, None
        return Effect(self._page, acted=True)

    def _judge(self, button: Element) -> bool:
        values = tuple(e.value for e in self._page.elements if e.kind == "field")
        return button.label == self._answers[0] if not self._is_form() else values == self._answers

    def _is_form(self) -> bool:
        return not self._page.sentence.startswith("Click")

    def _login(self, rng: random.Random, button: str = "Login") -> Page:
        self._answers = (rng.choice(NAMES).lower(), _password(rng))
        user, password = self._answers
        fields = (Element("field", "Username"), Element("field", "Password"))
        sentence = f'Enter the username "{user}" and the password "{password}" into the text fields and press login.'
        return Page(sentence, (*fields, Element("button", button)))

    def _login_popup(self, rng: random.Random) -> Page:
        page = self._login(rng, button="OK")
        self._warning = rng.choice(_WARNINGS)
        self._popup_on = rng.choice((1, 2, None, None))
        return page

    def _enter_password(self, rng: random.Random) -> Page:
        password = _password(rng)
        self._answers = (password, password)
        fields = (Element("field", "Password"), Element("field", "Verify password"))
        return Page(
            f'Enter the password "{password}" into both text fields and press submit.',
            (*fields, Element("button", "Submit")),
        )

    def _enter_text(self, rng: random.Random) -> Page:
        self._answers = (rng.choice(NAMES),)
        sentence = f'Enter "{self._answers[0]}" into the text field and press Submit.'
        return Page(sentence, (Element("field", ""), Element("button", "Submit")))

    def _click_button(self, rng: random.Random) -> Page:
        elements: list[Element] = []
        for _ in range(6):
            draw = rng.random()
            if draw < 0.33:
                continue
            if draw < 0.66:
                elements.append(Element("field", rng.choice(("", rng.choice(NAMES) + ":"))))
            else:
                elements.append(Element("button", _button_label(rng)))
        if not any(e.kind == "button" for e in elements):
            elements.append(Element("button", _button_label(rng)))
        self._answers = (rng.choice([e.label for e in elements if e.kind == "button"]),)
        return Page(f'Click on the "{self._answers[0]}" button.', tuple(elements))


_BUILDERS = {
    "login-user": PlayedPages._login,
    "enter-password": PlayedPages._enter_password,
    "enter-text": PlayedPages._enter_text,
    "click-button": PlayedPages._click_button,
    "login-user-popup": PlayedPages._login_popup,
}


def _password(rng: random.Random) -> str:
    return "".join(rng.choices(_ALPHANUMERIC, k=rng.randint(2, 5)))


def _button_label(rng: random.Random) -> str:
    label = rng.choice(_BUTTONS)
    return label.capitalize() if rng.random() < 0.5 else label


def browser_free_env(task: str) -> PageEnv:
    """The browser-free environment of a task."""
    if task not in _BUILDERS:
        raise ValueError(f"unknown task {task!r}: one of {', '.join(_BUILDERS)}")
    return PageEnv(task, PlayedPages())
