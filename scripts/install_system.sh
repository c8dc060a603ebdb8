#!/bin/sh
# Installs what the demo needs from the system: Chromium and its driver, from the distribution's own packages.
# Without them the demo runs on its browser-free pages. Debian and Ubuntu; elsewhere it says what to look for.
set -eu

if command -v chromium >/dev/null 2>&1 && command -v chromedriver >/dev/null 2>&1; then
    echo "chromium and chromedriver are installed"
    exit 0
fi
if ! command -v apt-get >/dev/null 2>&1; then
    echo "No apt-get here. Install Chromium and the chromedriver of the same version with your package manager," >&2
    echo "or set MINIWOB_CHROME_BINARY and MINIWOB_CHROMEDRIVER to where they are." >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "This installs packages: run it as root, for example: sudo $0" >&2
    exit 1
fi
apt-get update
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium chromium-driver
