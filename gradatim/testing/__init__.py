"""Fakes and conformance suites (`check_<seam>`) for every protocol, for users to import in their own tests."""
