"""The end of a training that failed: who says why, and with which exit code."""

from pipeline.base.launch import Launch
from pipeline.base.logs import logger
from pipeline.base.signals import StopRequest
from pipeline.data.samples import DataError
from pipeline.learning.update import NonFiniteError
from pipeline.parallel.rank import RemoteError, is_lost_connection
from pipeline.run.folder import RunError


def report_failure(error: Exception, launch: Launch, stop: StopRequest) -> int:
    """Log why the training failed, and return exit code 1. Raises `error` again if its traceback is the explanation.

    Only the cause is to be read first: a rank that fails because another one did waits to be ended by the launcher.
    """
    if isinstance(error, DataError | NonFiniteError | RunError):
        logger.error("%s", error)
        return 1
    if not (isinstance(error, RemoteError) or is_lost_connection(error)):
        raise error
    if not stop:
        launch.await_end(seconds=5)
        if not isinstance(error, RemoteError):
            raise error  # nobody else ended: the cause may be here
    logger.warning("ended because another rank did: %s", error)
    return 1
