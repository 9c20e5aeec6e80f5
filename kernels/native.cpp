// What the library was compiled from; `kernels/native.py` compares it with the sources that it finds.
extern "C" const char* joinwise_native_sources() { return JOINWISE_SOURCES; }
