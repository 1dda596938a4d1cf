from tools.tiny.stages import main

if __name__ == "__main__":
    main()
