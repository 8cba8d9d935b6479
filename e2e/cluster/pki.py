"""The cluster's own certificate authority, made anew with each cluster by openssl.

One authority signs the API server's serving certificate and the client certificate that the API server shows to the
kubelet. Pods get the authority in their service-account volume, so a test's proxy that reuses the serving certificate
is trusted by them. Nothing here is a secret worth keeping: it dies with the cluster.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster.steps import ToolingError

_DAYS = "365"


@dataclass(frozen=True)
class Pki:
    """Paths of PEM files in one folder."""

    folder: Path

    @property
    def ca(self) -> Path:
        """The authority's certificate."""
        return self.folder / "ca.crt"

    @property
    def serving_cert(self) -> Path:
        """The API server's serving certificate."""
        return self.folder / "serving.crt"

    @property
    def serving_key(self) -> Path:
        """The serving certificate's key."""
        return self.folder / "serving.key"

    @property
    def kubelet_client_cert(self) -> Path:
        """What the API server shows to the kubelet."""
        return self.folder / "kubelet-client.crt"

    @property
    def kubelet_client_key(self) -> Path:
        """The key to it."""
        return self.folder / "kubelet-client.key"

    @property
    def service_account_key(self) -> Path:
        """What signs service-account tokens."""
        return self.folder / "service-account.key"


def make_pki(folder: Path, *, addresses: list[str], names: list[str]) -> Pki:
    """Make the authority, a serving certificate for the addresses and names, and the API server's client certificate."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    pki = Pki(folder)
    ca_key = folder / "ca.key"
    _new_key(ca_key)
    _openssl(
        [
            "req",
            "-x509",
            "-new",
            "-key",
            ca_key,
            "-subj",
            "/CN=lora-operator test cluster",
            "-days",
            _DAYS,
            "-out",
            pki.ca,
        ],
        ["-addext", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature"],
    )
    alternatives = [f"IP:{address}" for address in addresses] + [f"DNS:{name}" for name in names]
    _sign(folder, "serving", subject="/CN=kube-apiserver", usage="serverAuth", alternatives=alternatives)
    _sign(folder, "kubelet-client", subject="/O=system:masters/CN=kube-apiserver", usage="clientAuth", alternatives=[])
    _openssl(["genrsa", "-out", pki.service_account_key, "2048"])
    return pki


def _new_key(path: Path) -> None:
    _openssl(["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", path])


def _sign(folder: Path, name: str, *, subject: str, usage: str, alternatives: list[str]) -> None:
    ca, ca_key = folder / "ca.crt", folder / "ca.key"
    key, request, certificate = folder / f"{name}.key", folder / f"{name}.csr", folder / f"{name}.crt"
    _new_key(key)
    _openssl(["req", "-new", "-key", key, "-subj", subject, "-out", request])
    lines = [
        "basicConstraints=critical,CA:FALSE",
        "keyUsage=critical,digitalSignature",
        f"extendedKeyUsage={usage}",
        "subjectKeyIdentifier=hash",
        "authorityKeyIdentifier=keyid",
    ]
    if alternatives:
        lines.append(f"subjectAltName={','.join(alternatives)}")
    extensions = folder / f"{name}.ext"
    extensions.write_text("\n".join(lines) + "\n")
    _openssl(
        ["x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-days", _DAYS],
        ["-extfile", extensions, "-out", certificate],
    )


def _openssl(*words: list[str | Path]) -> None:
    command = ["openssl", *(str(word) for group in words for word in group)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if result.returncode:
        raise ToolingError(f"`{' '.join(command[:3])}` failed: {result.stderr.strip()}")
