"""No long pauses while robots wait."""

import gc


def freeze_startup_objects() -> None:
    """Keep the garbage collector from walking again and again, for tens of ms, through all that has just been loaded.

    What an earlier call has set aside is looked through once more: of replaced weights nothing stays.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
