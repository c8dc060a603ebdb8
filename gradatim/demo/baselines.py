"""What the live agent is compared with: acting at random among valid actions, and retrieval on the frozen model.

The frozen model itself needs no code: it is the same agent with ``model="NAME@0"``. The retrieval agent is given the
same feedback as the learner, in the form of the training episodes, and shows the most similar right steps as examples
in place of the fixed ones. Nothing here trains anything.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable

from openai.types.chat import ChatCompletionMessageParam
from sklearn.feature_extraction.text import TfidfVectorizer

from gradatim.demo.agent import EXAMPLES, EpisodeRecord, messages
from gradatim.demo.tasks import Env


def random_valid_episode(env: Env, seed: int) -> bool:
    """One attempt by drawing among the valid actions; the same seed draws the same actions."""
    rng = random.Random(seed)
    env.reset(seed)
    while True:
        result = env.step(rng.choice(env.valid_actions()))
        if result.done:
            return bool(result.success)


class RetrievalAgent:
    """Keeps (page, right action) and builds prompts from the ``k`` pages most similar to the one at hand.

    Similarity is the cosine of TF-IDF vectors of word and number tokens. Until something is known the fixed examples
    stand; with fewer than ``k`` known steps they fill up.
    """

    def __init__(self, k: int = 5) -> None:
        self.k = k
        self._known: dict[str, str] = {}
        self._vectorizer: TfidfVectorizer | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def learn(self, records: Iterable[EpisodeRecord]) -> None:
        """Takes the corrections of every episode, and the valid steps of those that succeeded."""
        with self._lock:
            for record in records:
                for step in record.steps:
                    if step.corrected or (record.success and step.valid):
                        self._known[step.observation] = step.executed
            self._vectorizer = None

    def retrieve(self, observation: str) -> list[tuple[str, str]]:
        """The most similar known steps, the most similar last, where a small model attends most."""
        with self._lock:
            if not self._known:
                return []
            if self._vectorizer is None:
                self._vectorizer = TfidfVectorizer(token_pattern=r"\w+").fit(self._known)
                self._matrix = self._vectorizer.transform(self._known)
            scores = (self._matrix @ self._vectorizer.transform([observation]).T).toarray()[:, 0]
            pages = list(self._known)
            nearest = sorted(range(len(pages)), key=lambda i: float(scores[i]))[-self.k :]
            return [(pages[i], self._known[pages[i]]) for i in nearest]

    def prompt(self, observation: str) -> list[ChatCompletionMessageParam]:
        """A prompt builder for `run_episode`."""
        found = self.retrieve(observation)
        return messages(observation, [*EXAMPLES[: max(0, self.k - len(found))], *found])
