"""The errors of Kinflow, split by what the one who catches them can do.

| error         | raised by                       | caught by                          | retry? | exit code          |
|---------------|---------------------------------|------------------------------------|--------|--------------------|
| `ConfigError` | `config`, `credentials`, cameras | `cli`                              | no     | 78 (configuration) |
| `BundleError` | `manifest`, `segment`, `export` | `cli`                              | no     | 65 (bad data)      |
| `PacketError` | `packet`, `codec`               | `node`, `device`: counted, dropped | no     | 65 (bad data)      |
| `CameraError` | `camera_*`                      | `device`: reopens with back-off    | yes    | 66 (no input)      |
| `LinkError`   | `link_*`                        | `cli`, at start only               | yes    | 69 (unavailable)   |

The codes are those of sysexits(3). A message is one sentence that names the thing and says what to change.
"""

from __future__ import annotations


class KinflowError(Exception):
    """Anything that Kinflow itself reports; `exit_code` is what `cli` leaves with."""

    exit_code = 70


class ConfigError(KinflowError):
    """A setting is missing, unknown or of the wrong type."""

    exit_code = 78


class BundleError(KinflowError):
    """A bundle, a model or calibration data cannot be used as it is."""

    exit_code = 65


class PacketError(KinflowError):
    """Bytes from the wire are not what the header, the manifest or the codec promises."""

    exit_code = 65


class CameraError(KinflowError):
    """A source of frames cannot be opened, or gives no frames any more.

    `reason` is the word to count it by: `open`, `silent`, `broken`, `resized`, `late` or `frozen`.
    """

    exit_code = 66

    def __init__(self, sentence: str, reason: str = "broken") -> None:
        super().__init__(sentence)
        self.reason = reason


class LinkError(KinflowError):
    """A broker cannot be reached or refuses us."""

    exit_code = 69
