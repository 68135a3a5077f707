"""Every error of the stack; each message says what happened and what to do about it.

StackError
├── SpecError                 the requested stack makes no sense
├── FolderError               a folder cannot be written or its disk is full
├── DownloadError             a server's files could not be fetched
├── PrivilegeError            root cannot hand Postgres to an ordinary user
├── PortError
│   ├── PortTaken             somebody listens on a port that was asked for
│   └── NoFreePorts           no run of free ports was found
├── StackExists               the name is taken by another stack
├── StackNotFound             there is no stack, or not in that folder
├── UnknownNode               the stack has no node of that name
├── NodeError
│   ├── NodeDied              a process ended that should run; carries the end of its log
│   ├── NodeNotReady          a process runs but does not do its work in time; carries the end of its log
│   ├── NodeStuck             processes of a node outlived SIGKILL or a graceful stop
│   └── NoFailpoints          a node has no failpoints that can be armed now
└── StackClosing              the stack is being taken down while something was still starting
"""


class StackError(Exception):
    """Base of everything the stack raises on purpose; `str()` is fit to show to a user."""


class SpecError(StackError):
    """The requested stack makes no sense."""


class FolderError(StackError):
    """A folder cannot be written, or too little space is left on its disk."""


class DownloadError(StackError):
    """Files of a server could not be fetched or do not have the locked checksum."""


class PrivilegeError(StackError):
    """Started as root, but Postgres (which refuses root) cannot be handed to an ordinary user."""


class PortError(StackError):
    """Ports could not be had."""


class PortTaken(PortError):
    """A port that was asked for is in use; the message names the holder where it can be seen."""


class NoFreePorts(PortError):
    """No run of free consecutive ports was found."""


class LockHeld(StackError):
    """Another process has been changing the same thing for too long."""


class StackExists(StackError):
    """The name is taken by a stack that is still there."""


class StackNotFound(StackError):
    """There is no stack at the given place."""


class UnknownNode(StackError):
    """The stack has no node of that name; the message lists those it has."""


class NodeError(StackError):
    """A node did not do as asked."""


class NodeDied(NodeError):
    """A node's process ended although it should run."""


class NodeNotReady(NodeError):
    """A node runs but does not do its work within the time given."""


class NodeStuck(NodeError):
    """Processes of a node are still there although they were told to end."""


class NoFailpoints(NodeError):
    """A node has no failpoints that can be armed now; the message says why."""


class StackClosing(StackError):
    """The stack is being taken down; nothing more is started."""
