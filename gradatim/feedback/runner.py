"""Runs every test beside it and reports under a number: the program that ``code`` puts into the sandbox.

Test functions and unittest's classes alike, without pytest, which the sandbox may not have. What the code under test
prints does not matter; only a line that begins with the number counts, and the number is gone before that code runs.
"""

from __future__ import annotations

import importlib
import os
import sys
import unittest


def main() -> None:
    with open(".number") as file:
        number = file.read()
    os.unlink(".number")
    sys.path.insert(0, os.getcwd())
    out = os.dup(1)
    suite = unittest.TestSuite()
    for name in sorted(os.listdir(".")):
        if name.startswith("test_") and name.endswith(".py"):
            module = importlib.import_module(name[:-3])
            suite.addTests(unittest.defaultTestLoader.loadTestsFromModule(module))
            functions = [f for n, f in sorted(vars(module).items()) if n.startswith("test") and callable(f)]
            suite.addTests(unittest.FunctionTestCase(f) for f in functions if not isinstance(f, type))
    total = suite.countTestCases()
    result = unittest.TestResult()
    suite.run(result)
    bad = [*result.failures, *result.errors, *((t, "unexpected success") for t in result.unexpectedSuccesses)]
    passed = result.testsRun - len({id(test) for test, _ in bad}) - len(result.skipped)
    first = f"{bad[0][0].id()}: {bad[0][1].strip().splitlines()[-1][:200]}" if bad else ""
    os.write(out, f"\n{number} {passed} {total} {first}\n".encode())
    os._exit(0 if passed == total else 1)


if __name__ == "__main__":
    main()
