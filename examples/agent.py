"""An agent on the plain OpenAI client that learns: it groups its calls into episodes and says how each one ended.

    gradatim serve                                   # in another terminal
    python examples/agent.py http://127.0.0.1:8080

Run it again after a while: `gradatim status` shows what was learned from its corrections.
"""

import sys

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from gradatim.client import Gradatim

TASKS = {
    "Which colour is the door of room 7?": "teal",
    "Which colour is the door of room 9?": "amber",
    "Which colour is the door of room 12?": "teal",
}


def solve(llm: OpenAI, gradatim: Gradatim, question: str, right: str) -> bool:
    """Two attempts at one task; what was wrong is corrected, and the outcome is reported."""
    with gradatim.episode() as episode:
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": question}]
        for _ in range(2):
            answer = llm.chat.completions.create(model="agent", messages=messages, max_tokens=12)
            text = answer.choices[0].message.content or ""
            if right in text.lower():
                break
            gradatim.correct(answer, right, comment="Name the colour alone.")
            messages.append({"role": "assistant", "content": text})
            messages.append({"role": "user", "content": "That is not right. Try again."})
        solved = right in text.lower()
        episode.outcome(solved)
        return solved


def main(url: str) -> None:
    with Gradatim(url, source="human:example") as gradatim:
        llm = OpenAI(base_url=gradatim.base_url, api_key="unused", default_headers=gradatim.headers)
        solved = [solve(llm, gradatim, question, right) for question, right in TASKS.items()]
        llm.close()
    print(f"solved {sum(solved)} of {len(solved)}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080")
