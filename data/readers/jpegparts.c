/* Parts of JPEG tiles, decoded straight into a region: jpegtile.c for Python. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include "jpegtile.h"

#include <math.h>

static long again; /* tiles that libjpeg had to say about */

/* -1 with an exception set unless every part lies inside its tile and inside the region. */
static int check_places(const Region *region, const Place *places, Py_ssize_t count) {
    int64_t width = region->tile_width / region->reduce, height = region->tile_height / region->reduce;
    for (Py_ssize_t i = 0; i < count; i++) {
        const Place *p = &places[i];
        if (p->left < 0 || p->top < 0 || p->left >= p->right || p->top >= p->bottom || p->right > width || p->bottom > height ||
            p->x < 0 || p->y < 0 || p->x > region->width - (p->right - p->left) || p->y > region->height - (p->bottom - p->top)) {
            PyErr_Format(PyExc_ValueError, "place %zd is outside its tile of %lld x %lld px or outside the region", i, (long long)width,
                         (long long)height);
            return -1;
        }
    }
    return 0;
}

static PyObject *reasons_of(char (*reasons)[JMSG_LENGTH_MAX], Py_ssize_t count) {
    PyObject *found = PyDict_New();
    for (Py_ssize_t i = 0; found && i < count; i++) {
        if (!reasons[i][0]) continue;
        PyObject *number = PyLong_FromSsize_t(i), *text = PyUnicode_DecodeLatin1(reasons[i], strlen(reasons[i]), NULL);
        if (!number || !text || PyDict_SetItem(found, number, text) < 0) Py_CLEAR(found);
        Py_XDECREF(number);
        Py_XDECREF(text);
    }
    return found;
}

/* The tiles as buffers; -1 with an exception set, and none held. */
static int hold(PyObject *list, Py_buffer *tiles, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++)
        if (PyObject_GetBuffer(PyList_GET_ITEM(list, i), &tiles[i], PyBUF_SIMPLE) < 0) {
            while (i-- > 0) PyBuffer_Release(&tiles[i]);
            return -1;
        }
    return 0;
}

PyDoc_STRVAR(paint_doc,
"paint(pixels, tiles, places, tables, ycbcr, tile_width, tile_height, reduce, seconds=inf) -> dict[int, str]\n\n"
"Decode a part of each JPEG tile into its place in pixels, uint8 [height, width, 3], C-contiguous.\n\n"
"tiles: list of n bytes-like objects. places: int64 [n, 6]: left, top, right, bottom of the part, px of the tile divided by\n"
"`reduce` (1, 2, 4 or 8), and its corner x, y in pixels. tables: shared JPEG tables, or b''. ycbcr: whether the samples are YCbCr\n"
"or RGB, whatever the markers say. seconds: of this thread's CPU, after which it is given up. Returns why the tiles that are\n"
"damaged are; their place may hold anything.\n"
"Raises TimeoutError after `seconds`, ValueError for places outside, TypeError and BufferError for what is no such array.");

static PyObject *paint(PyObject *module, PyObject *arguments) {
    PyObject *array, *list, *found = NULL;
    Py_buffer pixels = {0}, placed, tables;
    Scan scan = {0};
    int ycbcr, tile_width, tile_height, reduce, late = 0;
    double seconds = HUGE_VAL;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OO!y*y*piii|d", &array, &PyList_Type, &list, &placed, &tables, &ycbcr, &tile_width, &tile_height,
                          &reduce, &seconds))
        return NULL;
    Py_ssize_t count = PyList_GET_SIZE(list);
    Py_buffer *tiles = PyMem_Calloc(count ? count : 1, sizeof *tiles);
    char(*reasons)[JMSG_LENGTH_MAX] = PyMem_Calloc(count ? count : 1, sizeof *reasons);
    unsigned char *scratch = NULL;
    if (!tiles || !reasons) {
        PyErr_NoMemory();
        goto done;
    }
    if (PyObject_GetBuffer(array, &pixels, PyBUF_ND | PyBUF_WRITABLE) < 0) goto done;
    if (pixels.ndim != 3 || pixels.itemsize != 1 || pixels.shape[2] != 3 || placed.len != count * (Py_ssize_t)sizeof(Place) ||
        (reduce != 1 && reduce != 2 && reduce != 4 && reduce != 8) || tile_width < reduce || tile_height < reduce ||
        tile_width % reduce || tile_height % reduce) {
        PyErr_SetString(PyExc_ValueError, "expected pixels uint8 [height, width, 3], places int64 [n, 6] of n tiles, and reduce 1, 2, 4 or "
                                          "8 that divides the sides of a tile");
        goto done;
    }
    scratch = PyMem_Malloc((size_t)tile_width * 3 * TILE_ROWS);
    if (!scratch) {
        PyErr_NoMemory();
        goto done;
    }
    Region region = {pixels.buf, pixels.shape[1], pixels.shape[0], tables.buf, tables.len, ycbcr ? JCS_YCbCr : JCS_RGB,
                     tile_width, tile_height, reduce, scratch, &scan, tile_clock() + seconds};
    if (check_places(&region, placed.buf, count) < 0 || hold(list, tiles, count) < 0) goto done;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count && !late; i++)
        late = tile_paint(&region, tiles[i].buf, tiles[i].len, (const Place *)placed.buf + i, reasons[i], &again) == TILE_LATE;
    Py_END_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++) PyBuffer_Release(&tiles[i]);
    if (late) PyErr_Format(PyExc_TimeoutError, "%zd JPEG tiles took more than %d s of CPU time", count, (int)seconds);
    else found = reasons_of(reasons, count);
done:
    if (pixels.obj) PyBuffer_Release(&pixels);
    free(scan.bytes);
    PyMem_Free(scratch);
    PyMem_Free(reasons);
    PyMem_Free(tiles);
    PyBuffer_Release(&placed);
    PyBuffer_Release(&tables);
    return found;
}

PyDoc_STRVAR(read_twice_doc,
"read_twice() -> int\n\n"
"How many tiles of this process were not plainly whole, so that libjpeg decoded them again: damaged ones, and rare kinds.");

static PyObject *read_twice(PyObject *module, PyObject *nothing) {
    (void)module, (void)nothing;
    return PyLong_FromLong(__atomic_load_n(&again, __ATOMIC_RELAXED));
}

static PyMethodDef methods[] = {{"paint", paint, METH_VARARGS, paint_doc},
                                {"read_twice", read_twice, METH_NOARGS, read_twice_doc},
                                {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "jpegparts", "Parts of JPEG tiles, decoded straight into a region.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_jpegparts(void) {
    return PyModule_Create(&definition);
}
