/* Parts of JPEG tiles, decoded straight into a region with libjpeg-turbo.

   Outside the wanted part only the entropy code is read: no inverse DCT, no colours, no copy of the tile. The rest of the scan is
   read to its end all the same, because damage often shows only there. Pixels equal those of the whole tile, bit for bit: where
   chroma is interpolated, one block more on each side is decoded. The entropy code is read by jpegscan.c where it is plainly
   whole, and else by libjpeg, which then says whether it is damaged. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include "jpegscan.h"
#include <jerror.h>

#ifndef LIBJPEG_TURBO_VERSION
#error "libjpeg-turbo is needed: other libjpegs can neither crop nor skip while they decode"
#endif
#if JPEG_LIB_VERSION >= 70
#define DCT_HEIGHT(component) ((component)->DCT_v_scaled_size)
#define MIN_DCT_WIDTH(c) ((c)->min_DCT_h_scaled_size)
#define MIN_DCT_HEIGHT(c) ((c)->min_DCT_v_scaled_size)
#else
#define DCT_HEIGHT(component) ((component)->DCT_scaled_size)
#define MIN_DCT_WIDTH(c) ((c)->min_DCT_scaled_size)
#define MIN_DCT_HEIGHT(c) ((c)->min_DCT_scaled_size)
#endif

#define ROWS 16 /* that libjpeg is asked for at a time: one by one costs a tenth of decoding */

/* What a part needs, in pixels of the (reduced) tile, and its corner in the region. */
typedef struct {
    int64_t left, top, right, bottom, x, y;
} Place;

/* Everything that all tiles of a call share. */
typedef struct {
    unsigned char *pixels; /* uint8 [height, width, 3] */
    int64_t width, height;
    const unsigned char *tables;
    unsigned long tables_size;
    J_COLOR_SPACE colour;
    JDIMENSION tile_width, tile_height;
    unsigned int reduce;
    unsigned char *scratch; /* ROWS rows of a tile */
    Scan *scan;
} Region;

typedef struct {
    struct jpeg_error_mgr standard;
    jmp_buf escape;
    char text[JMSG_LENGTH_MAX];
} Errors;

static void fail(j_common_ptr c) {
    Errors *errors = (Errors *)c->err;
    errors->standard.format_message(c, errors->text);
    longjmp(errors->escape, 1);
}

/* A warning is damage: libjpeg would go on with grey blocks. Not so for what JFIF and Adobe markers say: the layout decides. */
static void warn(j_common_ptr c, int level) {
    if (level < 0 && c->err->msg_code != JWRN_ADOBE_XFORM && c->err->msg_code != JWRN_JFIF_MAJOR) fail(c);
}

static void refuse(Errors *errors, const char *format, unsigned a, unsigned b, unsigned wanted_a, unsigned wanted_b) {
    snprintf(errors->text, sizeof errors->text, format, a, b, wanted_a, wanted_b);
    longjmp(errors->escape, 1);
}

/* Leaves the frame header read and checked. */
static void begin(j_decompress_ptr c, Errors *errors, const Region *region, const unsigned char *data, unsigned long size) {
    if (region->tables_size) {
        jpeg_mem_src(c, region->tables, region->tables_size);
        jpeg_read_header(c, FALSE);
    }
    jpeg_mem_src(c, data, size);
    jpeg_read_header(c, TRUE);
    if (c->image_width != region->tile_width || c->image_height != region->tile_height)
        refuse(errors, "its image is %ux%u, expected %ux%u", c->image_width, c->image_height, region->tile_width, region->tile_height);
    if (c->num_components == 3)
        c->jpeg_color_space = region->colour;
    else if (c->num_components != 1)
        refuse(errors, "it has %u components, expected 3", c->num_components, 0, 0, 0);
    c->out_color_space = JCS_RGB;
    c->scale_num = 1;
    c->scale_denom = region->reduce;
    jpeg_start_decompress(c);
}

/* Rows and columns beside a part that interpolated chroma looks at: one block of the coarsest component. */
static void margins(j_decompress_ptr c, JDIMENSION *across, JDIMENSION *down) {
    *across = *down = 0;
    for (int i = 0; i < c->num_components; i++) {
        jpeg_component_info *component = &c->comp_info[i];
        if (component->h_samp_factor * DCT_WIDTH(component) != c->max_h_samp_factor * MIN_DCT_WIDTH(c) ||
            component->v_samp_factor * DCT_HEIGHT(component) != c->max_v_samp_factor * MIN_DCT_HEIGHT(c)) {
            *across = c->max_h_samp_factor * MIN_DCT_WIDTH(c);
            *down = c->max_v_samp_factor * MIN_DCT_HEIGHT(c);
        }
    }
}

/* Reads rows before `stop`, at most ROWS, to memory whose rows are `stride` bytes apart; how many there were. */
static JDIMENSION read_rows(j_decompress_ptr c, JDIMENSION stop, unsigned char *to, size_t stride) {
    JSAMPROW rows[ROWS];
    JDIMENSION count = stop - c->output_scanline < ROWS ? stop - c->output_scanline : ROWS;
    for (JDIMENSION i = 0; i < count; i++) rows[i] = to + i * stride;
    return jpeg_read_scanlines(c, rows, count);
}

static void paint_tile(j_decompress_ptr c, Errors *errors, const Region *region, const unsigned char *data, unsigned long size,
                       const Place *place, int by_libjpeg) {
    begin(c, errors, region, data, size);
    JDIMENSION across, down, start = 0, width = c->output_width;
    margins(c, &across, &down);
    JDIMENSION left = place->left, top = place->top, right = place->right, bottom = place->bottom;
    JDIMENSION first = left > across ? left - across : 0, last = right + across < width ? right + across : width;
    if (first > 0 || last < width) {
        start = first, width = last - first;
        jpeg_crop_scanline(c, &start, &width);
    }
    const JDIMENSION mcu = MIN_DCT_WIDTH(c) * (c->num_components == 1 ? 1 : c->max_h_samp_factor);
    const int taken = !by_libjpeg && scan_take(region->scan, c, start / mcu, (start + width - 1) / mcu, &errors->escape);
    if (top > down) jpeg_skip_scanlines(c, top - down);
    const size_t stride = region->width * 3, row = (size_t)width * 3, wanted = (size_t)(right - left) * 3;
    while (c->output_scanline < top) read_rows(c, top, region->scratch, row);
    unsigned char *out = region->pixels + place->y * stride + place->x * 3;
    while (c->output_scanline < bottom) {
        if (row == wanted) {
            out += read_rows(c, bottom, out, stride) * stride;
            continue;
        }
        JDIMENSION count = read_rows(c, bottom, region->scratch, row);
        for (JDIMENSION i = 0; i < count; i++, out += stride) memcpy(out, region->scratch + i * row + (left - start) * 3, wanted);
    }
    if (taken) {
        scan_finish(region->scan);
        return;
    }
    if (c->output_scanline + 1 < c->output_height) jpeg_skip_scanlines(c, c->output_height - 1 - c->output_scanline);
    while (c->output_scanline < c->output_height) /* skipping to the very end would not read it */
        read_rows(c, c->output_height, region->scratch, row);
    jpeg_finish_decompress(c);
}

/* Paints one tile; 0, or 1 with the reason where it is damaged, or SCAN_STRANGE where libjpeg must say. Its decompressor is its
   own: tables of another tile must not serve one that lacks them. */
static int attempt(const Region *region, const Py_buffer *tile, const Place *place, int by_libjpeg, char *reason) {
    struct jpeg_decompress_struct c = {0};
    Errors errors = {0};
    c.err = jpeg_std_error(&errors.standard);
    errors.standard.error_exit = fail;
    errors.standard.emit_message = warn;
    int verdict = 0;
    switch (setjmp(errors.escape)) {
    case 0:
        if (tile->len == 0) refuse(&errors, "it is empty", 0, 0, 0, 0);
        jpeg_create_decompress(&c);
        paint_tile(&c, &errors, region, tile->buf, tile->len, place, by_libjpeg);
        break;
    case SCAN_STRANGE:
        verdict = SCAN_STRANGE;
        break;
    default:
        memcpy(reason, errors.text, sizeof errors.text);
        verdict = 1;
    }
    jpeg_destroy_decompress(&c);
    return verdict;
}

static long strange; /* tiles that libjpeg had to say about */

static void try_tile(const Region *region, const Py_buffer *tile, const Place *place, char *reason) {
    if (attempt(region, tile, place, 0, reason) != SCAN_STRANGE) return;
    __atomic_fetch_add(&strange, 1, __ATOMIC_RELAXED);
    attempt(region, tile, place, 1, reason);
}

/* -1 with an exception set unless every part lies inside its tile and inside the region. */
static int check_places(const Region *region, const Place *places, Py_ssize_t count) {
    int64_t width = region->tile_width / region->reduce, height = region->tile_height / region->reduce;
    for (Py_ssize_t i = 0; i < count; i++) {
        const Place *p = &places[i];
        if (p->left < 0 || p->top < 0 || p->left >= p->right || p->top >= p->bottom || p->right > width || p->bottom > height ||
            p->x < 0 || p->y < 0 || p->x + p->right - p->left > region->width || p->y + p->bottom - p->top > region->height) {
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
"paint(pixels, tiles, places, tables, ycbcr, tile_width, tile_height, reduce) -> dict[int, str]\n\n"
"Decode a part of each JPEG tile into its place in pixels, uint8 [height, width, 3], C-contiguous.\n\n"
"tiles: list of n bytes-like objects. places: int64 [n, 6]: left, top, right, bottom of the part, px of the tile divided by\n"
"`reduce` (1, 2, 4 or 8), and its corner x, y in pixels. tables: shared JPEG tables, or b''. ycbcr: whether the samples are YCbCr\n"
"or RGB, whatever the markers say. Returns why the tiles that are damaged are; their place may hold anything.\n"
"Raises ValueError for places outside, TypeError and BufferError for what is no such array.");

static PyObject *paint(PyObject *module, PyObject *arguments) {
    PyObject *array, *list, *found = NULL;
    Py_buffer pixels = {0}, placed, tables;
    Scan scan = {0};
    int ycbcr, tile_width, tile_height, reduce;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OO!y*y*piii", &array, &PyList_Type, &list, &placed, &tables, &ycbcr, &tile_width, &tile_height,
                          &reduce))
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
    scratch = PyMem_Malloc((size_t)tile_width * 3 * ROWS);
    if (!scratch) {
        PyErr_NoMemory();
        goto done;
    }
    Region region = {pixels.buf, pixels.shape[1], pixels.shape[0], tables.buf, tables.len, ycbcr ? JCS_YCbCr : JCS_RGB,
                     tile_width, tile_height, reduce, scratch, &scan};
    if (check_places(&region, placed.buf, count) < 0 || hold(list, tiles, count) < 0) goto done;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++) try_tile(&region, &tiles[i], (const Place *)placed.buf + i, reasons[i]);
    Py_END_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++) PyBuffer_Release(&tiles[i]);
    found = reasons_of(reasons, count);
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
    return PyLong_FromLong(__atomic_load_n(&strange, __ATOMIC_RELAXED));
}

static PyMethodDef methods[] = {{"paint", paint, METH_VARARGS, paint_doc},
                                {"read_twice", read_twice, METH_NOARGS, read_twice_doc},
                                {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "jpegparts", "Parts of JPEG tiles, decoded straight into a region.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_jpegparts(void) {
    return PyModule_Create(&definition);
}
