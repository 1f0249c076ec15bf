"""Credentials kept out of files and messages: users and passwords in URIs, and the values of secret settings."""

import os
import re

SECRET = "(?:password|passwd|token|secret|api_?key|access_?key)"


def without_credentials(text: str) -> str:
    """Return a text without users and passwords of URIs, and values of settings and variables with such names."""
    # a password may hold what ends a host name, as database drivers read it: then it goes up to the last @
    text = re.sub(r"(?<=//)(?:[^/?#\s]*|[^/?#@:\s]*:(?!\d+[/?#])[^\s'\"]*)@", "", text)
    text = re.sub(rf"(?i)\b(\w*{SECRET}\w*)=('[^']*'|\"[^\"]*\"|[^&\s]+)", r"\1=***", text)
    for name, value in os.environ.items():
        if len(value) >= 8 and value in text and re.search(f"(?i){SECRET}", name):
            text = text.replace(value, "***")
    return text
