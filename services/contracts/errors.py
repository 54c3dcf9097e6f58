"""The one exception tree. Every message says what is wrong and what to do next.

KeepwarmError (1)
├── UsageError (2)          a flag, a setting or an environment variable is unusable
├── InputError (3)          a file of claims or a prompt file is unusable
├── EngineError (4)         an engine cannot hold this context, or stopped holding it
│   ├── ModelError          the model or its tokenizer is missing or does not fit the prompt
│   ├── KeeperError         the keeper of this node's engines cannot be used
│   ├── EngineStartError    the engine died or stayed silent before it was ready
│   └── EngineRequestError  one request failed; the engine may still be well
├── BrokerError (5)         the broker cannot be used
│   ├── BrokerUnreachable   nobody answers at the address
│   ├── BrokerRefused       it answers and says no: password, virtual host, permission
│   ├── BrokerUntrusted     no TLS connection with it can be made: certificate, name, plain port
│   └── TopologyMismatch    a queue exists with other arguments
├── StoreError (6)          the store or an output file cannot be read or written
│   └── StoreRefused        the database refuses a value for what it is: a retry fails again
├── RunIncomplete (7)       the command ended before every claim had an outcome
├── LabelsUnlikely (8)      the model hardly ever says a label word; its verdicts mean little
├── MessageTooNew (9)       a message is of a newer Keepwarm than this one; it was given back
└── MessageInvalid (1)      a message is not ours, or breaks the contract

The number is the exit code of a command that ends with the error.
"""

from typing import ClassVar


class KeepwarmError(Exception):
    """Something went wrong that a person can mend."""

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
