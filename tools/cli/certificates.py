"""The cluster's own certificate authority, and certificates for its machines.

An authority of its own, and not the hospital's, because being signed by it means to be a member of this cluster.
"""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS: Final = 3650
CERTIFICATE_DAYS: Final = 825
EARLIER: Final = datetime.timedelta(days=1)  # for clocks that differ


@dataclass(frozen=True)
class Authority:
    """Files `ca.crt` and `ca.key` in a folder."""

    folder: Path

    @property
    def certificate(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def key(self) -> Path:
        return self.folder / "ca.key"

    def make(self, cluster: str) -> None:
        """Raises FileExistsError rather than replace one: all certificates would be worth nothing."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = ec.generate_private_key(ec.SECP256R1())
        _write(self.key, _private(key), 0o600, new=True)
        # Each authority by a name and key identifier of its own: two are trusted at a time while one follows the other.
        name = _name(f"Tandem cluster {cluster} {datetime.datetime.now(datetime.UTC):%Y-%m-%d} {os.urandom(4).hex()}")
        usage = x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=True,
            crl_sign=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        made = (
            _begun(name, name, key.public_key(), AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        _write(self.certificate, made.public_bytes(serialization.Encoding.PEM), 0o644)

    def issue(self, folder: Path, machine: str, addresses: Sequence[str]) -> None:
        """Write `node.crt`, `node.key` and `ca.crt` for a machine into `folder`, in the place of earlier ones.

        `addresses`: IP addresses by which others reach it. Raises OSError or ValueError.
        """
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # whatever the umask: it is copied, and read by the gateway's user
        signer = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        signing = serialization.load_pem_private_key(self.key.read_bytes(), None)
        if not isinstance(signing, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{self.key}: not a key that we made")
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.DNSName(machine), x509.DNSName("localhost")]
        names += [x509.IPAddress(ipaddress.ip_address(address)) for address in (*addresses, "127.0.0.1")]
        both_ways = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        made = (
            _begun(_member(machine), signer.subject, key.public_key(), CERTIFICATE_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(both_ways, critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
            .sign(signing, hashes.SHA256())
        )
        _write(folder / "node.key", _private(key), 0o640)
        _write(folder / "node.crt", made.public_bytes(serialization.Encoding.PEM), 0o644)
        _write(folder / "ca.crt", self.certificate.read_bytes(), 0o644)


def expires(certificate: Path) -> datetime.datetime:
    """When a certificate ends, UTC. Raises OSError or ValueError."""
    return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc


def _begun(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - EARLIER)
    return builder.not_valid_after(now + datetime.timedelta(days=days))


def _member(machine: str) -> x509.Name:
    """Without a common name: etcd takes that for a user, and says in its log at each request that it doesn't."""
    named = ((NameOID.ORGANIZATION_NAME, "Tandem"), (NameOID.ORGANIZATIONAL_UNIT_NAME, machine))
    return x509.Name([x509.NameAttribute(kind, value) for kind, value in named])


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes, mode: int, *, new: bool = False) -> None:
    """In one step, so that nobody reads half of it."""
    if new and path.exists():
        raise FileExistsError(0, f"{path} is there already")
    temporary = path.with_name(path.name + ".new")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(temporary, mode)
    temporary.rename(path)
