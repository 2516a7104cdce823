"""How a run says that it was stopped: apart from the trainer, since every command looks for it and few need a backbone."""


class Preempted(Exception):
    """The run was asked to stop (SIGTERM, SIGUSR1) and has saved itself after `step` steps."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped on request after step {step}; the same command continues")
        self.step = step
