"""All exceptions. Every message says what is wrong and what to do next.

KeepwarmError (1)
├── UsageError (2)          a flag, a setting or an environment variable is unusable
├── InputError (3)          a file of claims or a prompt file is unusable
├── EngineError (4)         an engine cannot hold this context, or stopped holding it
│   ├── ModelError          the model or its tokenizer is missing or does not fit the prompt
│   ├── KeeperError         the keeper of this node's engines cannot be used
│   ├── EngineStartError    the engine ended or timed out before it was ready
│   └── EngineRequestError  one request failed; the engine may still be healthy
├── BrokerError (5)         the broker cannot be used
│   ├── BrokerUnreachable   nothing answers at the address
│   ├── BrokerRefused       it refuses the password, virtual host or permission
│   ├── BrokerUntrusted     TLS fails: certificate, host name, or a port without TLS
│   └── TopologyMismatch    a queue exists with different arguments
├── StoreError (6)          the store or an output file cannot be read or written
│   └── StoreRefused        the database refuses a value; a retry would fail again
├── RunIncomplete (7)       the command ended before every claim had an outcome
├── LabelsUnlikely (8)      the model rarely answers with a label word
├── MessageTooNew (9)       a message needs a newer Keepwarm; it was returned to its queue
└── MessageInvalid (1)      a message is not Keepwarm's, or is malformed

The number is the exit code of a command that ends with the error.
"""

from typing import ClassVar


class KeepwarmError(Exception):
    """An error that the user can fix."""

    exit_code: ClassVar[int] = 1


class UsageError(KeepwarmError):
    exit_code = 2


class InputError(KeepwarmError):
    exit_code = 3


class EngineError(KeepwarmError):
    exit_code = 4


class ModelError(EngineError):
    pass


class KeeperError(EngineError):
    pass


class EngineStartError(EngineError):
    pass


class EngineRequestError(EngineError):
    pass


class BrokerError(KeepwarmError):
    exit_code = 5


class BrokerUnreachable(BrokerError):
    pass


class BrokerRefused(BrokerError):
    pass


class BrokerUntrusted(BrokerError):
    pass


class TopologyMismatch(BrokerError):
    pass


class StoreError(KeepwarmError):
    exit_code = 6


class StoreRefused(StoreError):
    pass


class RunIncomplete(KeepwarmError):
    exit_code = 7


class LabelsUnlikely(KeepwarmError):
    exit_code = 8


class MessageTooNew(KeepwarmError):
    exit_code = 9


class MessageInvalid(KeepwarmError):
    pass
