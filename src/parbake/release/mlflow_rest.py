"""An MLflow server over its REST API, which takes milliseconds and nothing but the standard library.

Who may ask is said as MLflow's own clients have it: ``MLFLOW_TRACKING_TOKEN``, or ``MLFLOW_TRACKING_USERNAME`` and
``MLFLOW_TRACKING_PASSWORD``.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, Final

from parbake.errors import NotAllowed, RegistryAway, SettingsError
from parbake.release.mlflow import Calls, Found, Missing

_TIMEOUT_S: Final = 20.0
_MAX_BYTES: Final = 64 * 1024 * 1024
_ABSENT: Final = "RESOURCE_DOES_NOT_EXIST"
_NO_ALIAS: Final = "INVALID_PARAMETER_VALUE"
_PAGE: Final = 200
_BY_ALIAS: Final = "registered-models/alias"


class RestCalls(Calls):
    """A tracking server at ``url``. Raises `SettingsError` for what is no URL."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(
                f"{url!r} is no registry", hint="https://HOST of an MLflow server, or sqlite:///PATH"
            )
        # Not shown: it may have a password in it.
        self.where = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip(
            "/"
        )
        self._authorization = _authorization(parts)

    def create_model(self, name: str) -> None:
        """As `Calls.create_model`."""
        try:
            self._call("POST", "registered-models/create", {"name": name})
        except _Refused as refused:
            if refused.code != "RESOURCE_ALREADY_EXISTS":
                raise self._away(refused) from refused

    def create_version(self, name: str, source: str, tags: Mapping[str, str]) -> Found:
        """As `Calls.create_version`."""
        body = {
            "name": name,
            "source": source,
            "tags": [{"key": key, "value": value} for key, value in tags.items()],
        }
        return _found(self._asked("POST", "model-versions/create", body)["model_version"])

    def model_names(self) -> Sequence[str]:
        """As `Calls.model_names`."""
        return [
            str(model["name"]) for model in self._pages("registered-models/search", "registered_models", {})
        ]

    def model_aliases(self, name: str) -> dict[str, str]:
        """As `Calls.model_aliases`."""
        model = self._asked("GET", "registered-models/get", {"name": name})["registered_model"]
        return {item["alias"]: str(item["version"]) for item in model.get("aliases", ())}

    def search(self, name: str) -> Sequence[Found]:
        """As `Calls.search`."""
        pages = self._pages("model-versions/search", "model_versions", {"filter": f"name='{name}'"})
        return [_found(version) for version in pages]

    def by_number(self, name: str, version: str) -> Found:
        """As `Calls.by_number`."""
        return _found(
            self._asked("GET", "model-versions/get", {"name": name, "version": version})["model_version"]
        )

    def by_alias(self, name: str, alias: str) -> Found:
        """As `Calls.by_alias`."""
        return _found(self._asked("GET", _BY_ALIAS, {"name": name, "alias": alias})["model_version"])

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """As `Calls.set_alias`."""
        self._asked("POST", _BY_ALIAS, {"name": name, "alias": alias, "version": version})

    def _pages(self, path: str, key: str, question: dict[str, str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        token = ""
        while True:
            asked = {**question, "max_results": str(_PAGE), **({"page_token": token} if token else {})}
            answer = self._asked("GET", path, asked)
            found += answer.get(key, ())
            token = answer.get("next_page_token", "")
            if not token:
                return found

    def _asked(self, method: str, path: str, question: dict[str, Any]) -> dict[str, Any]:
        """Call, and say what a refusal means: `Missing`, or `RegistryAway`."""
        try:
            return self._call(method, path, question)
        except _Refused as refused:
            if refused.code == _ABSENT or (
                refused.code == _NO_ALIAS and path == _BY_ALIAS and method == "GET"
            ):
                raise Missing(str(refused)) from refused
            raise self._away(refused) from refused

    def _call(self, method: str, path: str, question: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.where}/api/2.0/mlflow/{path}"
        body = None
        if method == "GET":
            url += "?" + urllib.parse.urlencode(question)
        else:
            body = json.dumps(question).encode()
        request = urllib.request.Request(url, body, {"content-type": "application/json"}, method=method)  # noqa: S310  checked above
        if self._authorization:
            request.add_unredirected_header("authorization", self._authorization)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:  # noqa: S310  checked above
                answer = json.loads(response.read(_MAX_BYTES))
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise self._away(reason if isinstance(reason, Exception) else error) from error
        if not isinstance(answer, dict):
            raise self._away(ValueError("the answer is no object: is it an MLflow server?"))
        return answer

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        if error.code in (401, 403):
            return NotAllowed(
                f"the registry {self.where} refuses: {error.code} {error.reason}",
                hint="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
            )
        try:
            said = json.loads(error.read(65_536))
            return _Refused(str(said["error_code"]), str(said.get("message", "")))
        except (ValueError, KeyError, TypeError, OSError):
            return self._away(ValueError(f"{error.code} {error.reason}"))

    def _away(self, error: Exception) -> RegistryAway:
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return RegistryAway(
            f"the registry {self.where} does not answer as it should: {words[:300]}",
            hint="is the MLflow server running there? what serves goes on serving",
        )


class _Refused(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


def _authorization(parts: urllib.parse.SplitResult) -> str:
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return f"Bearer {token}"
    user = parts.username or os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    password = parts.password or os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    if not user:
        return ""
    pair = f"{urllib.parse.unquote(user)}:{urllib.parse.unquote(password)}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def _found(version: Mapping[str, Any]) -> Found:
    return Found(
        str(version["name"]),
        str(version["version"]),
        str(version.get("source", "")),
        int(version.get("creation_timestamp", 0)),
        {item["key"]: item.get("value", "") for item in version.get("tags", ())},
    )
