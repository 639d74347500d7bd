// Rows kept smaller than they are delivered: gathered with the widening inside, and made.
#pragma once

#include "gather/gather.h"
#include "gather/row_format.h"

namespace dataeff {

// How the rows of a table are kept and delivered. Element e of row r is worth
// scales[r] * code[r, e]; formats without a scale leave `scales` null.
struct RowCoding {
  RowFormat format;
  Element element;
  const float* scales;
};

// Bytes of one element as kept, and as delivered.
int64_t code_nbytes(RowFormat format);
int64_t element_nbytes(Element element);

// Widens row index[i] of `table` (whose sizes are those of the codes) to out, rows back to back.
// Checked first, like gather_cpu.
void gather_decoded_cpu(const RowTable& table, const RowCoding& coding, const RowIndex& index,
                        std::byte* out, int num_threads);

// Narrows `source`, rows of `coding.element`, to int8 or float8 codes back to back, each row by its
// own scale: the largest magnitude of the row over the largest code, and at least 2^-126, the
// smallest normal number, so that its reciprocal is finite. Throws std::invalid_argument naming the
// first row that holds a NaN or an infinity, which no scale can carry.
void encode_rows(const RowTable& source, Element element, RowFormat format, std::byte* codes,
                 float* scales, int num_threads);

}  // namespace dataeff
