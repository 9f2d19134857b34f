from dat.classification.audit import main
from dat.engine.command import main_guard

if __name__ == "__main__":
    main_guard(main)
